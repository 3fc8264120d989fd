// Undoes begin_bodies.h.
#ifdef __CUDACC_RTC__
#undef __global__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__ __attribute__((global))
#define __launch_bounds__(...) __attribute__((launch_bounds(__VA_ARGS__)))
#define __grid_constant__ __attribute__((grid_constant))
#else
#pragma pop_macro("__grid_constant__")
#pragma pop_macro("__launch_bounds__")
#pragma pop_macro("__global__")
#endif
