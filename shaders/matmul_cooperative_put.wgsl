// From registers to the tiles at a_base and b_base.
#for r A_LOADS
      a_put(a_base, thread + {r}u * THREADS, a_next{r});
#end
#for r B_LOADS
      b_put(b_base, thread + {r}u * THREADS, b_next{r});
#end
