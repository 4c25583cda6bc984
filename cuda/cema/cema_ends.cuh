// End states of sequences without an output: phase 4 of cema.cuh without y, launched by cema_scan.cu.
//
// Grid: as the scan's (cema_scan.cuh); a thread has two channels and some modes of a tile. It scans the sequences that
// end in the tile, each from its start or from the state that enters the tile, and stores their last states.
//
// Registers and shared memory: as in phase 2. 3 multiply-adds per mode, for each position of a tile that belongs to a
// sequence which ends in the tile. Bytes: x at these positions; phase 2 has read all of x once.
#pragma once

#include "cema_scan.cuh"

namespace megalodon {
namespace cema {

template <class T, int modes>
__global__ void __launch_bounds__(kThreads, kBlocks<Compute<T>>) cema_ends_kernel(Scan scan) {
  using R = Compute<T>;
  SMEM_ARRAY(Pair<R>, slots, 2 * modes * kThreads);
  const Place place = cema::place(scan, modes);
  const int64_t from = scan.begin(place.tile), to = scan.end(place.tile);
  for (int64_t begin = from; begin < to;) {
    const Run run(scan, begin, to);
    if (run.sequence >= 0 && run.ends(scan)) {
      Modes<R, modes> state(scan, place);
      if (!run.starts && scan.tiles > 1) state.load(scan, place);
      const int64_t at = scan.token(begin) * scan.channels + place.channel;
      walk(scan, place, state, scan.in.as<T>(), at, static_cast<int>(run.end - begin));
      state.leave(scan, place, run.sequence, slots + threadIdx.x);
    }
    begin = run.end;
  }
}

}  // namespace cema
}  // namespace megalodon
