// What two compilers call by different names. NVRTC makes a GPU's kernels of sweeps.cu; a host's
// compiler makes the same functions of it, with warps of one lane, so that tests can check every
// bit without a GPU.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

#ifdef __CUDACC__
constexpr int LANES = 32;
#define FUNCTION __device__ __forceinline__
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
#define SHARED __shared__
FUNCTION int this_lane() { return threadIdx.x % LANES; }
FUNCTION int this_warp() { return threadIdx.x / LANES; }
FUNCTION int this_program() { return blockIdx.x; }
FUNCTION void wait_for_program() { __syncthreads(); }
FUNCTION void wait_for_warp() { __syncwarp(); }
FUNCTION float as_float(u32 bits) { return __uint_as_float(bits); }
FUNCTION u32 as_bits(float value) { return __float_as_uint(value); }
FUNCTION bool is_finite(float value) { return fabsf(value) < __int_as_float(0x7F800000); }
template <typename VALUE>
FUNCTION VALUE* in_global_memory(VALUE* values) {  // which the compiler cannot know of a table's
    __builtin_assume(__isGlobal(values));
    return values;
}
FUNCTION void add_to(u64* sum, u64 value) { atomicAdd(sum, value); }
// Adds to `sum` the products of four signed bytes.
FUNCTION int dot(u32 left, u32 right, int sum) { return __dp4a(int(left), int(right), sum); }
// Four of the eight bytes of two words, by a digit of `choice` each.
FUNCTION u32 bytes_of(u32 low, u32 high, u32 choice) { return __byte_perm(low, high, choice); }
FUNCTION u64 sum_over_warp(u64 value) {
    for (int distance = LANES / 2; distance; distance /= 2)
        value += __shfl_xor_sync(0xFFFFFFFF, value, distance);
    return value;
}
FUNCTION u32 to_bfloat16(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
FUNCTION u32 to_float16(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
#else
#include <cmath>
#include <cstring>
constexpr int LANES = 1;
#define FUNCTION inline
#define KERNEL extern "C" void
#define SHARED static
#define __restrict__
static int current_program;
FUNCTION int this_lane() { return 0; }
FUNCTION int this_warp() { return 0; }
FUNCTION int this_program() { return current_program; }
FUNCTION void wait_for_program() {}
FUNCTION void wait_for_warp() {}
FUNCTION float as_float(u32 bits) { float value; std::memcpy(&value, &bits, 4); return value; }
FUNCTION u32 as_bits(float value) { u32 bits; std::memcpy(&bits, &value, 4); return bits; }
FUNCTION bool is_finite(float value) { return std::isfinite(value); }
template <typename VALUE>
FUNCTION VALUE* in_global_memory(VALUE* values) { return values; }
FUNCTION void add_to(u64* sum, u64 value) { *sum += value; }
FUNCTION int dot(u32 left, u32 right, int sum) {
    for (int shift = 0; shift < 32; shift += 8)
        sum += int((signed char)(left >> shift)) * int((signed char)(right >> shift));
    return sum;
}
FUNCTION u32 bytes_of(u32 low, u32 high, u32 choice) {
    u64 both = low | u64(high) << 32;
    u32 chosen = 0;
    for (int i = 0; i < 4; ++i)
        chosen |= u32(both >> (choice >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
    return chosen;
}
FUNCTION u64 sum_over_warp(u64 value) { return value; }
FUNCTION u32 nearest_bfloat16(float value) {
    u32 bits = as_bits(value);
    return std::isnan(value) ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
FUNCTION u32 to_bfloat16(float low, float high) {
    return nearest_bfloat16(low) | nearest_bfloat16(high) << 16;
}
FUNCTION u32 nearest_float16(float value) {
    _Float16 rounded = static_cast<_Float16>(value);
    u16 pattern;
    std::memcpy(&pattern, &rounded, 2);
    return std::isnan(value) ? 0x7FFF : pattern;
}
FUNCTION u32 to_float16(float low, float high) {
    return nearest_float16(low) | nearest_float16(high) << 16;
}
#endif
