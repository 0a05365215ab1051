// Adds the product of the tiles at a_base and b_base.
#for q K_FRAGMENTS
    {
#for i FM
#if A_BY_K
      let ia{i} = a_base + (sub_row + {i}u * 16u) * A_PITCH + {q}u * 16u / CELL;
      let sa{i} = A_PITCH;
      let a{i} = coopLoadT<coop_mat16x16<f16, A>>(&tile_a[ia{i}], sa{i});
#else
      let ia{i} = a_base + {q}u * 16u * A_PITCH + (sub_row + {i}u * 16u) / CELL;
      let sa{i} = A_PITCH;
      let a{i} = coopLoad<coop_mat16x16<f16, A>>(&tile_a[ia{i}], sa{i});
#end
#end
#for j FN
#if B_BY_K
      let ib{j} = b_base + (sub_column + {j}u * 16u) * B_PITCH + {q}u * 16u / CELL;
      let sb{j} = B_PITCH;
      let b{j} = coopLoad<coop_mat16x16<f16, B>>(&tile_b[ib{j}], sb{j});
#else
      let ib{j} = b_base + {q}u * 16u * B_PITCH + (sub_column + {j}u * 16u) / CELL;
      let sb{j} = B_PITCH;
      let b{j} = coopLoadT<coop_mat16x16<f16, B>>(&tile_b[ib{j}], sb{j});
#end
#end
#for i FM
#for j FN
      c{i}_{j} = coopMultiplyAdd(a{i}, b{j}, c{i}_{j});
#end
#end
    }
#end
