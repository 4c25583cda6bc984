#include "isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "bindings.h"

namespace megalodon {
namespace {

#define MEGALODON_STRING_(isa, ...) #isa,
#define MEGALODON_STRING_OF_(isa) MEGALODON_STRING_(isa)
constexpr const char* kNames[] = {
    MEGALODON_STRING_OF_(MEGALODON_LOWEST_ISA) MEGALODON_FOR_EACH_HIGHER_ISA(MEGALODON_STRING_)};
#undef MEGALODON_STRING_
#undef MEGALODON_STRING_OF_
constexpr int kIsas = sizeof(kNames) / sizeof(kNames[0]);

#if defined(__x86_64__)
// clang before version 19 does not know these names for __builtin_cpu_supports().
bool f16c_lzcnt_movbe_supported() {
  unsigned a, b, c, d, extended;
  return __get_cpuid(1, &a, &b, &c, &d) && __get_cpuid(0x80000001, &a, &b, &extended, &d) && (c & bit_F16C) &&
         (c & bit_MOVBE) && (extended & bit_LZCNT);
}

// clang before version 15 and g++ before version 11 do not know this name, either.
bool avx_vnni_supported() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}
#endif

// Requests Linux's permission to use AMX. Returns true if it is granted and the processor has AMX with bfloat16 and
// 8-bit integers.
[[maybe_unused]] bool amx_supported() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kAmx = 1u << 22 | 1u << 24 | 1u << 25;  // bfloat16, tiles, 8-bit integers
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmx) == kAmx &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Returns true if this processor runs code compiled for kNames[i].
bool supported(int i) {
#if defined(__x86_64__)
  __builtin_cpu_init();  // the arrays `supported` are in the order of kNames
  const bool v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
  const bool v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && f16c_lzcnt_movbe_supported();
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  const bool v4_vnni = v4 && __builtin_cpu_supports("avx512vnni");
  const bool v4_bf16 = v4_vnni && __builtin_cpu_supports("avx512bf16");
  const bool supported[] = {v2, v3, v3 && avx_vnni_supported(), v4, v4_vnni, v4_bf16, v4_bf16 && amx_supported()};
  return supported[i];
#elif defined(__aarch64__) && defined(__linux__)
  // Every processor with BF16 that GCC 14 knows has I8MM, and Armv8.6 requires both.
  const bool dot = getauxval(AT_HWCAP) & HWCAP_ASIMDDP, i8mm = dot && getauxval(AT_HWCAP2) & HWCAP2_I8MM;
  const bool supported[] = {true, dot, i8mm, i8mm && getauxval(AT_HWCAP2) & HWCAP2_BF16};
  return supported[i];
#else
  return i == 0;
#endif
}

// Returns true if training is slower with this instruction set than with the next lower one, as with AVX512-BF16 on
// Intel processors without AMX (docs/cpu.md).
bool is_slower_than_next_lower([[maybe_unused]] int i) {
#if defined(__x86_64__)
  return static_cast<Isa>(i) == Isa::v4_bf16 && __builtin_cpu_is("intel");
#else
  return false;
#endif
}

std::string available_text() {
  std::string text;
  for (int i = 0; i < kIsas; ++i)
    if (supported(i)) text += (text.empty() ? "" : ", ") + std::string(kNames[i]);
  return text.empty() ? "none (an x86-64 processor needs SSE4.2)" : text;
}

// Activates the named instruction set; an empty name selects the best.
void set_isa(const std::string& name) {
  for (int i = kIsas - 1; i >= 0; --i)
    if ((name.empty() ? !is_slower_than_next_lower(i) : name == kNames[i]) && supported(i)) {
      active_isa = static_cast<Isa>(i);
      return;
    }
  throw py::value_error("instruction set `" + (name.empty() ? "any" : name) +
                        "` is not available here; available: " + available_text() + ".");
}

}  // namespace

Isa active_isa{};

const Registration register_isa{[](py::module_& module) {
  const char* forced = std::getenv("MEGALODON_OPS_ISA");
  try {
    set_isa(forced ? forced : "");
  } catch (const py::value_error& error) {
    throw py::import_error(std::string("megalodon_ops: ") + (forced ? "MEGALODON_OPS_ISA: " : "") + error.what());
  }
  module.def("active_isa", [] { return kNames[static_cast<int>(active_isa)]; });
  module.def("set_isa", &set_isa, py::arg("name"));
  module.def("built_isas", [] {
    py::list built;
    for (const char* name : kNames) built.append(name);
    return built;
  });
  module.def("available_isas", [] {
    py::list available;
    for (int i = 0; i < kIsas; ++i)
      if (supported(i)) available.append(kNames[i]);
    return available;
  });
}};

}  // namespace megalodon
