// Into registers: the tiles whose depth starts at k0.
#for r A_LOADS
      a_next{r} = a_load(thread + {r}u * THREADS, row0, k0);
#end
#for r B_LOADS
      b_next{r} = b_load(thread + {r}u * THREADS, column0, k0, extra);
#end
