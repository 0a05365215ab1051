// From registers to the tiles at a_base and b_base.
#for r A_LOADS
      a_stage(a_base, thread + {r}u * THREADS, a_next{r});
#end
#for r B_LOADS
      b_stage(b_base, thread + {r}u * THREADS, b_next{r});
#end
