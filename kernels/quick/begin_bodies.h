// Between this file and end_bodies.h, kernels become device functions of the same name and
// arguments. A quickly deployable TensorRT plugin needs a kernel with its outputs last, which calls
// the one we have. No include guard: a pair stands around each include. Include common.cuh before.
#ifndef __CUDACC_RTC__  // NVRTC has no such pragma; end_bodies.h gives its own definitions
#pragma push_macro("__global__")
#pragma push_macro("__launch_bounds__")
#pragma push_macro("__grid_constant__")
#endif
#undef __global__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__ __device__ __forceinline__
#define __launch_bounds__(...)
#define __grid_constant__
