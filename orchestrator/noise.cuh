// The words of noise.py, and what rounds by them. Knows neither slices nor tiles.
#pragma once

#include "compilers.cuh"

constexpr int EIGHT = 8;  // 16 bits each for as many elements: what a block of words holds
constexpr float UNITS = 32;  // noise.FACTOR_UNITS
constexpr u32 SIGN = 0x80000000;
constexpr u32 UPPER_HALF = 0xFFFF0000;
constexpr u32 PERTURBATION = 0, ROUNDING = 1;  // noise.Stream
constexpr int PHILOX_ROUNDS = 10;              // noise.PHILOX_ROUNDS

struct alignas(16) Vector {
    u32 word[4];
};

struct alignas(8) Pair {
    u32 word[2];
};

// A seed's keys in all rounds.
struct Keys {
    u32 word[2 * PHILOX_ROUNDS];
};

FUNCTION Keys keys_of(u64 seed) {
    Keys keys;
#pragma unroll
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
        keys.word[2 * round] = u32(seed) + round * 0x9E3779B9u;
        keys.word[2 * round + 1] = u32(seed >> 32) + round * 0xBB67AE85u;
    }
    return keys;
}

// Philox4x32-10 of several blocks under one seed. A product of 64 bits gives both of its halves.
template <int COUNT>
FUNCTION void philox(
    const u64 (&block)[COUNT], u32 name_word, u32 stream, const Keys& keys, Vector (&words)[COUNT]
) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        words[i] = {u32(block[i]), u32(block[i] >> 32), name_word, stream};
#pragma unroll
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            u32(&word)[4] = words[i].word;
            u64 product_0 = u64(word[0]) * 0xD2511F53u, product_1 = u64(word[2]) * 0xCD9E8D57u;
            word[0] = u32(product_1 >> 32) ^ word[1] ^ keys.word[2 * round];
            word[2] = u32(product_0 >> 32) ^ word[3] ^ keys.word[2 * round + 1];
            word[1] = u32(product_1);
            word[3] = u32(product_0);
        }
    }
}

// One of the two bfloat16 around each value, by chance in proportion; what is not finite stays.
template <bool ASK>
FUNCTION void round_stochastically(float (&value)[EIGHT], const Vector& words) {
#pragma unroll
    for (int j = 0; j < EIGHT; ++j) {
        u32 word = words.word[j / 2], chance = j % 2 ? word >> 16 : word & 0xFFFF;
        u32 bits = as_bits(value[j]);
        if (!ASK || is_finite(value[j])) bits += chance;
        value[j] = as_float(bits & UPPER_HALF);
    }
}

template <int COUNT>
FUNCTION void round_stochastically(
    float (&value)[COUNT][EIGHT], const u64 (&block)[COUNT], u32 name_word, const Keys& step
) {
    Vector words[COUNT];
    philox(block, name_word, ROUNDING, step, words);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        float sum = 0;  // finite only if all are: to ask each of them would take twice as long
#pragma unroll
        for (int j = 0; j < EIGHT; ++j) sum += value[i][j];
        if (is_finite(sum))
            round_stochastically<false>(value[i], words[i]);
        else
            round_stochastically<true>(value[i], words[i]);
    }
}
