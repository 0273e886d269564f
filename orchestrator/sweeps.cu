// Sweeps over slices of parameters: what sweeps.py promises, in the bits that noise.py specifies.
//
// A slice is cut into tiles of neighbouring elements, a tile is one warp's, and a program of
// several warps sweeps over tiles that follow each other. Every lane holds eight elements at a
// time: as many as share a block of gaussian noise, and 16 bytes of 16-bit values. Compiled without
// fused multiply-adds, which would round differently from a CPU; see sweeps_cuda.py.

#include "noise.cuh"

// ---------------------------------------------------------------- what a launch is compiled for

enum Format { NOTHING, FLOAT32, BFLOAT16, FLOAT16, FACTOR };

// STORED, SERVED      formats of the masters (NOTHING stands for zeros), and of the live values
//                     (NOTHING where the masters are live; FACTOR: 8 bits, in 1 / 32)
// GAUSSIAN            the kind of noise: gaussian, or rademacher
// ALIGNED             whether all rows begin with a block of words, and are whole vectors
// WARPS, ROUNDS       of a program, and tiles of a warp
// CHUNKS              eights of elements that a lane holds, were there 32 lanes
// RESIDENT            programs that a multiprocessor has room for, at least
// RANK                of low-rank noise
// ONE_STEP, ONE_DRAW  of low-rank noise: whether there is one step, and whether it has one draw
// DECAYS              whether any step multiplies its masters by anything but 1
// ROWS_A_TILE         of low-rank noise
// TILES_ACROSS        tiles of low-rank noise that lie side by side; 0 for a whole row
// DIGEST_LIVE         whether to digest live values

constexpr int THREADS = LANES * WARPS;
constexpr int TILE = 32 * CHUNKS * EIGHT;         // elements of a tile
constexpr int HELD = TILE / EIGHT / LANES;        // eights that a lane holds
constexpr int BLOCK = GAUSSIAN ? 8 : 128;         // elements that a block of words serves
constexpr int MAGNITUDES = 1024;
constexpr int WORDS = (RANK + 3) / 4;             // four ranks of a factor a word
// Of 1.5 * 2**23, whose lowest bit stands for 1: sums of whole numbers on top of it are floats
// already, as exact as conversions, which take longer.
constexpr int WHOLE_BITS = 0x4B400000;

struct Slice {  // sweeps_cuda.Field
    void* master;
    void* live;
    i64 rows, columns, live_stride, start, row_stride;
    i64 name_word, draw, first_program, tiles_a_row, num_tiles;
    const u8* left;
    const u8* right;
    i64 number, unused;
};

struct Draw {
    u64 seed;
    float coefficient;
    int closing;  // the number of the step that it is the last of, or -1
};

struct Step {
    u64 number;
    float decay;
    int end;  // the number of draws up to its last
};

// ---------------------------------------------------------------- eights in memory

// Which of a row's eight elements from `column` on are there.
struct Eight {
    i64 column, columns;
    FUNCTION bool has(int j) const {
        return ALIGNED ? column < columns : column + j >= 0 && column + j < columns;
    }
};

template <Format FORMAT>
FUNCTION void load(const void* row, Eight eight, float (&value)[EIGHT]) {
    if constexpr (FORMAT == FLOAT32) {
        const float* from = static_cast<const float*>(row) + eight.column;
        if constexpr (ALIGNED) {
            Vector first = {}, second = {};
            if (eight.has(0)) {
                first = reinterpret_cast<const Vector*>(from)[0];
                second = reinterpret_cast<const Vector*>(from)[1];
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                value[j] = as_float(first.word[j]);
                value[4 + j] = as_float(second.word[j]);
            }
        } else {
#pragma unroll
            for (int j = 0; j < EIGHT; ++j) value[j] = eight.has(j) ? from[j] : 0.f;
        }
    } else if constexpr (FORMAT == BFLOAT16) {
        const u16* from = static_cast<const u16*>(row) + eight.column;
        if constexpr (ALIGNED) {
            Vector all = {};
            if (eight.has(0)) all = *reinterpret_cast<const Vector*>(from);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                value[2 * j] = as_float(all.word[j] << 16);
                value[2 * j + 1] = as_float(all.word[j] & UPPER_HALF);
            }
        } else {
#pragma unroll
            for (int j = 0; j < EIGHT; ++j)
                value[j] = as_float(eight.has(j) ? u32(from[j]) << 16 : 0);
        }
    } else {
#pragma unroll
        for (int j = 0; j < EIGHT; ++j) value[j] = 0.f;
    }
}

// A row of a left factor, four ranks a word; there are zeros behind the last.
FUNCTION void load_left(const u8* from, u32 (&word)[WORDS]) {
    if constexpr (RANK % 8 == 0) {
#pragma unroll
        for (int w = 0; w < WORDS; w += 2) {
            Pair pair = reinterpret_cast<const Pair*>(from)[w / 2];
            word[w] = pair.word[0];
            word[w + 1] = pair.word[1];
        }
    } else if constexpr (RANK % 4 == 0) {
#pragma unroll
        for (int w = 0; w < WORDS; ++w) word[w] = reinterpret_cast<const u32*>(from)[w];
    } else {
#pragma unroll
        for (int w = 0; w < WORDS; ++w) word[w] = 0;
#pragma unroll
        for (int k = 0; k < RANK; ++k) word[k / 4] |= u32(from[k]) << k % 4 * 8;
    }
}

FUNCTION Pair load_bytes(const u8* row, Eight eight) {
    Pair pair = {};
    if constexpr (ALIGNED) {
        if (eight.has(0)) pair = *reinterpret_cast<const Pair*>(row + eight.column);
    } else {
#pragma unroll
        for (int j = 0; j < EIGHT; ++j)
            if (eight.has(j)) pair.word[j / 4] |= u32(row[eight.column + j]) << j % 4 * 8;
    }
    return pair;
}

// Four rows of a right factor from `first` on, eight columns of it: a word a column.
FUNCTION void load_right(const u8* right, i64 columns, int first, Eight eight, u32 (&word)[EIGHT]) {
    Pair row[4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k)
        if (first + k < RANK) row[k] = load_bytes(right + (first + k) * columns, eight);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        u32* to = word + 4 * half;
        u32 a = row[0].word[half], b = row[1].word[half];
        u32 c = row[2].word[half], d = row[3].word[half];
        u32 ab = bytes_of(a, b, 0x5140), cd = bytes_of(c, d, 0x5140);
        to[0] = bytes_of(ab, cd, 0x5410);
        to[1] = bytes_of(ab, cd, 0x7632);
        ab = bytes_of(a, b, 0x7362), cd = bytes_of(c, d, 0x7362);
        to[2] = bytes_of(ab, cd, 0x5410);
        to[3] = bytes_of(ab, cd, 0x7632);
    }
}

// Stores values as they are, or of a bfloat16 format the upper halves of their bits; with
// `ROUND` to nearest even.
template <Format FORMAT, bool ROUND>
FUNCTION void store(void* row, Eight eight, const float (&value)[EIGHT]) {
    if constexpr (FORMAT == FLOAT32) {
        float* to = static_cast<float*>(row) + eight.column;
        if constexpr (ALIGNED) {
            if (!eight.has(0)) return;
            Vector* target = reinterpret_cast<Vector*>(to);
            target[0] = {as_bits(value[0]), as_bits(value[1]), as_bits(value[2]), as_bits(value[3])};
            target[1] = {as_bits(value[4]), as_bits(value[5]), as_bits(value[6]), as_bits(value[7])};
        } else {
#pragma unroll
            for (int j = 0; j < EIGHT; ++j)
                if (eight.has(j)) to[j] = value[j];
        }
    } else if constexpr (FORMAT == FACTOR) {
        Pair all = {};
#pragma unroll
        for (int j = 0; j < EIGHT; ++j)
            all.word[j / 4] |= (u32(int(value[j] * UNITS)) & 0xFF) << j % 4 * 8;
        u8* to = static_cast<u8*>(row) + eight.column;
        if constexpr (ALIGNED) {
            if (eight.has(0)) *reinterpret_cast<Pair*>(to) = all;
        } else {
#pragma unroll
            for (int j = 0; j < EIGHT; ++j)
                if (eight.has(j)) to[j] = u8(all.word[j / 4] >> j % 4 * 8);
        }
    } else if constexpr (FORMAT != NOTHING) {
        Vector all;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float low = value[2 * j], high = value[2 * j + 1];
            if constexpr (!ROUND)
                all.word[j] = as_bits(low) >> 16 | (as_bits(high) & UPPER_HALF);
            else
                all.word[j] = FORMAT == BFLOAT16 ? to_bfloat16(low, high) : to_float16(low, high);
        }
        u16* to = static_cast<u16*>(row) + eight.column;
        if constexpr (ALIGNED) {
            if (eight.has(0)) *reinterpret_cast<Vector*>(to) = all;
        } else {
#pragma unroll
            for (int j = 0; j < EIGHT; ++j)
                if (eight.has(j)) to[j] = u16(all.word[j / 2] >> j % 2 * 16);
        }
    }
}

FUNCTION void* row_of(void* values, Format format, i64 offset) {
    int size = format == FLOAT32 ? 4 : format == FACTOR ? 1 : 2;
    return static_cast<u8*>(in_global_memory(values)) + offset * size;
}

// ---------------------------------------------------------------- where a warp is

struct Tile {
    const Slice* slice;
    i64 row, first;  // the first column, as if the row began with a block of words
    u64 index;       // of that column in the canonical tensor: a multiple of BLOCK

    // A lane's eights lie a warp's width apart.
    FUNCTION int offset(int held) const { return (held * LANES + this_lane()) * EIGHT; }
    FUNCTION Eight eight(int held) const { return {first + offset(held), slice->columns}; }
    FUNCTION u64 index_of(int held) const { return index + offset(held); }
    FUNCTION void blocks(u64 (&block)[HELD]) const {
#pragma unroll
        for (int held = 0; held < HELD; ++held) block[held] = index_of(held) / EIGHT;
    }
    FUNCTION void* master_row() const {
        return row_of(slice->master, STORED, row * slice->columns);
    }
    FUNCTION void* live_row() const {
        return row_of(slice->live, SERVED, row * slice->live_stride);
    }
};

FUNCTION Tile tile_of(const Slice* slice, int number) {
    i64 row = 0;
    int place = number;
    if (slice->rows > 1) {
        int tiles = int(slice->tiles_a_row);
        row = number / tiles;
        place = number % tiles;
    }
    u64 row_index = u64(slice->start + row * slice->row_stride);
    i64 skipped = ALIGNED ? 0 : i64(row_index % BLOCK);
    i64 first = i64(place) * TILE - skipped;
    return {slice, row, first, row_index + u64(first)};
}

// A warp's tiles of the program's slice, one a round.
FUNCTION int tile_number(const Slice* slice, int round) {
    return ((this_program() - int(slice->first_program)) * ROUNDS + round) * WARPS + this_warp();
}

// ---------------------------------------------------------------- noise

#if GAUSSIAN

// Adds coefficient * z, drawn in registers. The magnitudes are looked up in shared memory.
struct Noise {
    const u32* magnitudes;

    FUNCTION Noise(const u32* given) {
        SHARED u32 table[MAGNITUDES];
        for (int i = this_warp() * LANES + this_lane(); i < MAGNITUDES; i += THREADS)
            table[i] = given[i];
        wait_for_program();
        magnitudes = table;
    }
    FUNCTION void prepare(const Tile&, u32, const Keys&) {}
    FUNCTION void prepare(const Tile&, u32, const Draw*, int) {}
    FUNCTION u32 magnitude(u32 bytes) const {
        return *reinterpret_cast<const u32*>(reinterpret_cast<const u8*>(magnitudes) + bytes);
    }
    FUNCTION void add(
        const Tile& tile, u32 name_word, const Keys& keys, float coefficient, int,
        float (&sum)[HELD][EIGHT]
    ) const {
        u64 block[HELD];
        Vector words[HELD];
        tile.blocks(block);
        philox(block, name_word, PERTURBATION, keys, words);
#pragma unroll
        for (int held = 0; held < HELD; ++held) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                u32 word = words[held].word[j];
                u32 low = magnitude(word >> 4 & 0xFFC) ^ word << 31;
                u32 high = magnitude(word >> 20 & 0xFFC) ^ (word << 15 & SIGN);
                sum[held][2 * j] = sum[held][2 * j] + coefficient * as_float(low);
                sum[held][2 * j + 1] = sum[held][2 * j + 1] + coefficient * as_float(high);
            }
        }
    }
};
constexpr int GROUP = 1;

#else

// Adds coefficient * z. A block of words serves 16 lanes, so the lanes share the blocks of several
// draws among them, and pass the words on through shared memory.
constexpr int BLOCKS = TILE / BLOCK;
constexpr int GROUP = 32 / BLOCKS;  // draws that are prepared at a time: one block a lane

struct Noise {
    Vector* words;

    FUNCTION Noise(const u32*) {
        SHARED Vector all[WARPS][GROUP * BLOCKS];
        words = all[this_warp()];
    }
    FUNCTION void prepare(const Tile& tile, u32 name_word, const Keys& keys) {
        wait_for_warp();  // until the words of before are read
        for (int i = this_lane(); i < BLOCKS; i += LANES) draw(tile, name_word, keys, i);
        wait_for_warp();
    }
    FUNCTION void prepare(const Tile& tile, u32 name_word, const Draw* draws, int count) {
        wait_for_warp();
        for (int i = this_lane(); i < count * BLOCKS; i += LANES)
            draw(tile, name_word, keys_of(draws[i / BLOCKS].seed), i);
        wait_for_warp();
    }
    FUNCTION void draw(const Tile& tile, u32 name_word, const Keys& keys, int place) {
        u64 block[] = {tile.index / BLOCK + place % BLOCKS};
        Vector drawn[1];
        philox(block, name_word, PERTURBATION, keys, drawn);
        words[place] = drawn[0];
    }
    FUNCTION void add(
        const Tile& tile, u32, const Keys&, float coefficient, int place,
        float (&sum)[HELD][EIGHT]
    ) const {
        const u8* octets = reinterpret_cast<const u8*>(words + place * BLOCKS);
        u32 plus = as_bits(coefficient);
#pragma unroll
        for (int held = 0; held < HELD; ++held) {
            u32 octet = octets[tile.offset(held) / EIGHT];
#pragma unroll
            for (int j = 0; j < EIGHT; ++j)
                sum[held][j] = sum[held][j] + as_float(plus ^ (octet << (31 - j) & SIGN));
        }
    }
};

#endif

// ---------------------------------------------------------------- kernels

FUNCTION void load_masters(const Tile& tile, float (&value)[HELD][EIGHT]) {
#pragma unroll
    for (int held = 0; held < HELD; ++held)
        load<STORED>(tile.master_row(), tile.eight(held), value[held]);
}

FUNCTION void store_masters(const Tile& tile, const float (&value)[HELD][EIGHT]) {
#pragma unroll
    for (int held = 0; held < HELD; ++held)
        store<STORED, false>(tile.master_row(), tile.eight(held), value[held]);
}

FUNCTION void store_live(const Tile& tile, const float (&value)[HELD][EIGHT]) {
#pragma unroll
    for (int held = 0; held < HELD; ++held)
        store<SERVED, true>(tile.live_row(), tile.eight(held), value[held]);
}

// Where sums begin: what adds to it stays as it is, -0 too.
template <int COUNT>
FUNCTION void begin(float (&sum)[COUNT][EIGHT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
#pragma unroll
        for (int j = 0; j < EIGHT; ++j) sum[i][j] = -0.f;
}

// The masters after a step whose draws add up to `sum`, which then begins anew.
FUNCTION void take_step(
    const Tile& tile, u32 name_word, float decay, const Keys& step,
    float (&value)[HELD][EIGHT], float (&sum)[HELD][EIGHT]
) {
#pragma unroll
    for (int held = 0; held < HELD; ++held) {
#pragma unroll
        for (int j = 0; j < EIGHT; ++j) {
            float kept = DECAYS ? value[held][j] * decay : value[held][j];
            value[held][j] = kept + sum[held][j];
        }
    }
    begin(sum);
    if constexpr (STORED == BFLOAT16) {
        u64 block[HELD];
        tile.blocks(block);
        round_stochastically(value, block, name_word, step);
    }
}

// live = round(master + coefficient * z), with the slice's own of the draws.
KERNEL perturb(
    const Slice* __restrict__ slices,
    const int* __restrict__ owners,
    const Draw* __restrict__ draws,
    const u32* __restrict__ magnitudes
) {
    const Slice* slice = slices + owners[this_program()];
    Noise noise(magnitudes);
    const Draw* draw = draws + slice->draw;
    u32 name_word = u32(slice->name_word);
    for (int round = 0; round < ROUNDS; ++round) {
        int number = tile_number(slice, round);
        if (number >= slice->num_tiles) return;
        Tile tile = tile_of(slice, number);
        float value[HELD][EIGHT];
        load_masters(tile, value);
        Keys keys = keys_of(draw->seed);
        noise.prepare(tile, name_word, keys);
        noise.add(tile, name_word, keys, draw->coefficient, 0, value);
        store_live(tile, value);
    }
}

// Takes the steps, one after the other, and writes live, perturbed by the draw behind the steps'
// if `num_thens` is 1.
KERNEL update(
    const Slice* __restrict__ slices,
    const int* __restrict__ owners,
    const Draw* __restrict__ draws,
    const Step* __restrict__ steps,
    int num_draws,
    int num_thens,
    const u32* __restrict__ magnitudes
) {
    const Slice* slice = slices + owners[this_program()];
    Noise noise(magnitudes);
    u32 name_word = u32(slice->name_word);
    for (int round = 0; round < ROUNDS; ++round) {
        int number = tile_number(slice, round);
        if (number >= slice->num_tiles) return;
        Tile tile = tile_of(slice, number);
        float value[HELD][EIGHT], sum[HELD][EIGHT];
        load_masters(tile, value);
        begin(sum);
        for (int i = 0; i < num_draws; ++i) {
            if (i % GROUP == 0) {
                int left = num_draws - i;
                noise.prepare(tile, name_word, draws + i, left < GROUP ? left : GROUP);
            }
            Draw draw = draws[i];
            noise.add(tile, name_word, keys_of(draw.seed), draw.coefficient, i % GROUP, sum);
            if (draw.closing < 0) continue;
            Step step = steps[draw.closing];
            take_step(tile, name_word, step.decay, keys_of(step.number), value, sum);
        }
        store_masters(tile, value);
        if (num_thens) {
            Draw then = draws[num_draws];
            Keys keys = keys_of(then.seed);
            noise.prepare(tile, name_word, keys);
            noise.add(tile, name_word, keys, then.coefficient, 0, value);
        }
        store_live(tile, value);
    }
}

// A step with one draw, and the perturbation that follows. As an argument of a kernel it lies in
// constant memory, where instructions take keys from: none have to be made, or held in registers.
struct Once {
    Keys draw, step, then;
    float coefficient, decay, then_coefficient;
    int has_then;
};

// The same as `update`, for one draw.
KERNEL update_once(
    const Slice* __restrict__ slices,
    const int* __restrict__ owners,
    const Once once,
    const u32* __restrict__ magnitudes
) {
    const Slice* slice = slices + owners[this_program()];
    Noise noise(magnitudes);
    u32 name_word = u32(slice->name_word);
    for (int round = 0; round < ROUNDS; ++round) {
        int number = tile_number(slice, round);
        if (number >= slice->num_tiles) return;
        Tile tile = tile_of(slice, number);
        float value[HELD][EIGHT], sum[HELD][EIGHT];
        load_masters(tile, value);
        begin(sum);
        noise.prepare(tile, name_word, once.draw);
        noise.add(tile, name_word, once.draw, once.coefficient, 0, sum);
        take_step(tile, name_word, once.decay, once.step, value, sum);
        store_masters(tile, value);
        if (once.has_then) {
            noise.prepare(tile, name_word, once.then);
            noise.add(tile, name_word, once.then, once.then_coefficient, 0, value);
        }
        store_live(tile, value);
    }
}

// Adds coefficient * products of the i-th draw's factors: eights of rows that lie below each other.
FUNCTION void add_products(
    const Slice* slice, int i, i64 first_row, const Eight (&eight)[ROWS_A_TILE], float coefficient,
    float (&sum)[ROWS_A_TILE][EIGHT]
) {
    i64 rows = slice->rows, columns = slice->columns;
    const u8* left = in_global_memory(slice->left) + (i64(i) * rows + first_row) * RANK;
    const u8* right = in_global_memory(slice->right) + i64(i) * RANK * columns;
    u32 u[ROWS_A_TILE][WORDS], v[WORDS][EIGHT];
#pragma unroll
    for (int r = 0; r < ROWS_A_TILE; ++r)
        if (eight[r].columns) load_left(left + r * RANK, u[r]);
#pragma unroll
    for (int r = 0; r < ROWS_A_TILE; ++r) {
#pragma unroll
        for (int w = 0; w < WORDS; ++w)
            if (r == 0 || !ALIGNED) load_right(right, columns, 4 * w, eight[r], v[w]);
#pragma unroll
        for (int j = 0; j < EIGHT; ++j) {
            int whole = WHOLE_BITS;
#pragma unroll
            for (int w = 0; w < WORDS; ++w) whole = dot(u[r][w], v[w][j], whole);
            float products = as_float(u32(whole)) - as_float(WHOLE_BITS);
            sum[r][j] = sum[r][j] + coefficient * products;
        }
    }
}

// Takes steps along low-rank noise, one after the other. A tile is ROWS_A_TILE rows of 256 columns:
// what a lane reads of a right factor serves all of them. Tiles lie side by side in bands, as in
// memory, and a band's rows of tiles below each other: right factors stay in the cache.
KERNEL low_rank_update(
    const Slice* __restrict__ slices,
    const int* __restrict__ owners,
    const Draw* __restrict__ draws,
    const Step* __restrict__ steps,
    int num_draws,
    int num_steps,
    const Once once
) {
    const Slice* slice = slices + owners[this_program()];
    i64 rows = slice->rows, columns = slice->columns;
    int tiles_down = int((rows + ROWS_A_TILE - 1) / ROWS_A_TILE);
    int width = TILES_ACROSS ? TILES_ACROSS : int(slice->tiles_a_row);
    for (int round = 0; round < ROUNDS; ++round) {
        int number = tile_number(slice, round);
        if (number >= slice->num_tiles) return;
        int row_of_tiles = number / width;
        i64 first_row = i64(row_of_tiles % tiles_down) * ROWS_A_TILE;
        int band = row_of_tiles / tiles_down, place = number % width;
        i64 across = (i64(band) * width + place) * (32 * EIGHT);
        u64 first_index = u64(slice->start + first_row * slice->row_stride);
        void* masters = row_of(slice->master, STORED, first_row * columns);
        void* lives = row_of(slice->live, SERVED, first_row * slice->live_stride);
        for (int part = this_lane(); part < 32; part += LANES) {
            // Of an unaligned row, what shares a block of rounding bits begins elsewhere.
            Eight eight[ROWS_A_TILE];
            u64 block[ROWS_A_TILE];
            float value[ROWS_A_TILE][EIGHT], sum[ROWS_A_TILE][EIGHT];
#pragma unroll
            for (int r = 0; r < ROWS_A_TILE; ++r) {
                u64 row_index = first_index + u64(r * slice->row_stride);
                i64 skipped = ALIGNED ? 0 : i64(row_index % EIGHT);
                i64 column = across + part * EIGHT - skipped;
                eight[r] = {column, first_row + r < rows ? columns : 0};
                block[r] = ALIGNED ? first_index / EIGHT + u64(r * (slice->row_stride / EIGHT))
                        + u64(column / EIGHT)
                                   : (row_index + u64(column)) / EIGHT;
                load<STORED>(row_of(masters, STORED, r * columns), eight[r], value[r]);
            }
            int i = 0;
            for (int step = 0; step < (ONE_STEP ? 1 : num_steps); ++step) {
                begin(sum);
                int end = ONE_DRAW ? 1 : ONE_STEP ? num_draws : steps[step].end;
                for (; i < end; ++i) {
                    float coefficient = ONE_DRAW ? once.coefficient : draws[i].coefficient;
                    add_products(slice, i, first_row, eight, coefficient, sum);
                }
                float decay = ONE_STEP ? once.decay : steps[step].decay;
#pragma unroll
                for (int r = 0; r < ROWS_A_TILE; ++r) {
#pragma unroll
                    for (int j = 0; j < EIGHT; ++j) {
                        float kept = DECAYS ? value[r][j] * decay : value[r][j];
                        value[r][j] = kept + sum[r][j];
                    }
                }
                if constexpr (STORED == BFLOAT16 && ONE_STEP)
                    round_stochastically(value, block, u32(slice->name_word), once.step);
                else if constexpr (STORED == BFLOAT16) {
                    Keys keys = keys_of(steps[step].number);
                    round_stochastically(value, block, u32(slice->name_word), keys);
                }
            }
#pragma unroll
            for (int r = 0; r < ROWS_A_TILE; ++r) {
                store<STORED, false>(row_of(masters, STORED, r * columns), eight[r], value[r]);
                void* live = row_of(lives, SERVED, r * slice->live_stride);
                store<SERVED, true>(live, eight[r], value[r]);
            }
        }
    }
}

// Adds up each slice's checksum of the raw bits of its masters, or of its live values.
KERNEL digest(const Slice* __restrict__ slices, const int* __restrict__ owners, u64* sums) {
    const Slice* slice = slices + owners[this_program()];
    constexpr Format FORMAT = DIGEST_LIVE ? SERVED : STORED;
    u64 total = 0;
    for (int round = 0; round < ROUNDS; ++round) {
        int number = tile_number(slice, round);
        if (number >= slice->num_tiles) break;
        Tile tile = tile_of(slice, number);
        void* row = DIGEST_LIVE ? tile.live_row() : tile.master_row();
        for (int held = 0; held < HELD; ++held) {
            Eight eight = tile.eight(held);
            for (int j = 0; j < EIGHT; ++j) {
                if (!eight.has(j)) continue;
                i64 column = eight.column + j;
                u64 bits = FORMAT == FLOAT32 ? static_cast<const u32*>(row)[column]
                                             : static_cast<const u16*>(row)[column];
                u64 mixed = (tile.index_of(held) + j) * 0x9E3779B97F4A7C15u
                    + (bits + 1) * 0xD1B54A32D192ED03u;
                mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9u;
                mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EBu;
                total += mixed ^ mixed >> 31;
            }
        }
    }
    total = sum_over_warp(total);
    if (this_lane() == 0) add_to(sums + slice->number, total);
}
