#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if JAXINFER_HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace jaxinfer {

#if defined(__x86_64__)
namespace {

// What compilers do not all know by name. AVX2 says that the system saves the registers.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
bool has_avx_vnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#if JAXINFER_HAS_AMX
// Tiles of int8 and bfloat16; true also says that this process may use their registers, for which it has to ask once (Linux 5.16).
bool has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1) || !(d >> 25 & 1)) return false;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

}  // namespace
#endif

const Kernels* const* usable_kernels() {
  static const Kernels* found[7] = {nullptr};
  static const bool ready = [] {
    int n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#if JAXINFER_HAS_AMX
    if (bf16 && has_amx()) found[n++] = &kAmx;
#endif
    if (bf16) found[n++] = &kAvx512Bf16;
    if (avx512) found[n++] = &kAvx512;
    if (avx2 && has_avx_vnni()) found[n++] = &kAvx2Vnni;
    if (avx2) found[n++] = &kAvx2;
#elif defined(__aarch64__)
#if defined(__APPLE__)
    found[n++] = &kNeonDot;  // every CPU of Apple's has it
#elif defined(__linux__)
    constexpr unsigned long kAsimdDot = 1ul << 20;
    if (getauxval(AT_HWCAP) & kAsimdDot) found[n++] = &kNeonDot;
#endif
#endif
    found[n++] = &kPlain;
    return true;
  }();
  (void)ready;
  return found;
}

}  // namespace jaxinfer
