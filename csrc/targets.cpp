// What the library says about itself: the version of its interface, and which copies of the kernels can run here.

#if defined(_WIN32)
#define UW_PUBLIC extern "C" __declspec(dllexport)
#else
#define UW_PUBLIC extern "C" __attribute__((visibility("default")))
#endif

// Changes with the signature or the meaning of any exported function; library.py has the same number.
UW_PUBLIC int uw_abi_version() { return 7; }

// The instruction sets that the kernels are compiled for and this processor has, best first, separated by commas.
UW_PUBLIC const char *uw_targets() {
#if defined(UW_HAS_avx2)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#if defined(UW_HAS_avx512)
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"))
        return "avx512,avx2,generic";
#endif
    if (avx2) return "avx2,generic";
#endif
    return "generic";
}

// How many threads a parallel region gets. Follows torch.set_num_threads exactly when both share one OpenMP runtime.
UW_PUBLIC int uw_threads() {
    int threads = 0;
#pragma omp parallel reduction(+ : threads)
    threads += 1;
    return threads;
}
