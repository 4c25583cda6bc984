// What kernel files that hold their mutants (mutants.py) ask at run time, and whether a mutant would have mattered.
#include "state.h"

namespace emu {
std::vector<unsigned char> mattered(1 << 16);
}  // namespace emu

extern "C" {

int gpu_mutant = 0;  // the number of the one that runs; kernels take it for a constant

void gpu_reached(int mutant) { emu::mattered[mutant] = 1; }

bool gpu_value(int mutant, bool constant, bool value) {
  if (value != constant) emu::mattered[mutant] = 1;
  return value;
}

int gpu_turns(int mutant) {
  emu::mattered[mutant] = 1;
  return gpu_mutant == mutant;
}

}
