// Functions called by kernel files with mutants (mutants.py); records mutants that would have changed a value.
#include "state.h"

namespace emu {
std::vector<unsigned char> mattered(1 << 16);
}  // namespace emu

extern "C" {

int gpu_mutant = 0;  // number of the active mutant; a constant for kernels

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
