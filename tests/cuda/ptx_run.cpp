/* The instructions of PTX, as the PTX ISA describes them, and the memory that they see. */
#include "ptx.h"

#include <algorithm>
#include <limits>
#include <math.h>
#include <string.h>
#include <type_traits>
#include <unordered_map>

namespace ptx {

/* An asynchronous copy that was not awaited yet. */
struct copy { char *to; const char *from; size_t bytes; int group; };

struct thread {
    kernel *k;
    const host *hooks;
    const instruction *next;                /* NULL: at its end */
    uint64_t *r;
    const char *params;
    char *shared;
    unsigned id, special[9];
    uint32_t epoch;                         /* barriers of the block so far */
    uint32_t warp_syncs, warp_mask;         /* barriers of its warp, and who was at the last */
    const instruction *waits[2];            /* at a barrier, by parity of the epoch */
    const instruction *meets;               /* in an exchange of its warp */
    uint32_t given[OPERANDS];
    std::vector<copy> copies;
    int groups;
    std::vector<uint64_t> slots;
    std::vector<char> local;

    template <class T> T get(uint16_t slot) const {
        if constexpr (std::is_same<T, bool>::value)
            return r[slot] & 1;
        T x;
        memcpy(&x, r + slot, sizeof x);
        return x;
    }
    template <class T> void put(uint16_t slot, T x) { memcpy(r + slot, &x, sizeof x); }
    template <class T> void put_wide(uint16_t slot, T x) { /* registers may be wider than what comes */
        if constexpr (std::is_integral<T>::value)
            put<uint64_t>(slot, (uint64_t)x);
        else
            put(slot, x);
    }
    thread &lane(unsigned of) const;
};

/* Who used a byte of shared memory last: a thread, several of a warp, threads of several warps, or a copy
 * that is not awaited yet. */
enum : uint16_t { SEVERAL = 0x8000, COPY = 0xfffe, MANY = 0xffff };
struct use { uint32_t epoch; uint16_t who, warp_syncs; };
struct cell { use wrote, read; };

static struct {
    thread threads[THREADS];
    std::vector<cell> cells;                /* one for each byte of shared memory */
    unsigned serial = UINT32_MAX;
    uint32_t first = 0, last = 0;           /* epochs of this block */
} block;

thread &thread::lane(unsigned of) const { return block.threads[(id & ~31u) + of]; }

/* ---- stops ---- */

[[noreturn]] static void stop(const thread &t, const instruction &i, const std::string &what) {
    size_t at = 0;
    for (unsigned line = t.k->line; line < i.line; line++)
        at = t.k->text.find('\n', at) + 1;
    at = t.k->text.find_first_not_of(" \t", at);
    const std::string code = t.k->text.substr(at, t.k->text.find_first_of(";\n", at) - at);
    t.hooks->fault(t.k->name + ", block " + std::to_string(t.special[1]) + ", " + std::to_string(t.special[2])
                   + ", " + std::to_string(t.special[3]) + ", thread " + std::to_string(t.id) + ": "
                   + t.k->file + ":" + std::to_string(i.line) + ": " + code + ": " + what);
    abort();
}

static std::string hex(uint64_t x) {
    char text[20];
    snprintf(text, sizeof text, "0x%llx", (unsigned long long)x);
    return text;
}

/* ---- shared memory that several threads use ---- */

static int warp_of(const use &u) { return u.who & SEVERAL ? u.who - SEVERAL : u.who / 32; }

/* A use comes before all that the thread does now: a barrier of the block or of its warp lies between. */
static bool ordered(const thread &t, const use &u) {
    if (u.who == COPY)
        return u.epoch < block.first;
    if (u.epoch < t.epoch || u.who == t.id)
        return true;
    if (u.who == MANY || u.warp_syncs >= t.warp_syncs)
        return false;
    return warp_of(u) == (int)t.id / 32 && (u.who & SEVERAL || t.warp_mask >> u.who % 32 & 1);
}

static std::string name_of(const use &u) {
    return u.who == MANY     ? "several threads"
           : u.who & SEVERAL ? "several threads of warp " + std::to_string(warp_of(u))
                             : "thread " + std::to_string(u.who);
}

static void check_order(const thread &t, const instruction &i, size_t at, size_t bytes, bool writes) {
    for (cell *c = &block.cells[at], *end = c + bytes; c < end; c++) {
        if (!ordered(t, c->wrote))
            stop(t, i,
                 c->wrote.who == COPY
                     ? "shared memory that a copy not awaited yet will write"
                     : "no barrier since " + name_of(c->wrote) + " wrote this shared memory");
        if (writes && !ordered(t, c->read))
            stop(t, i, "no barrier since " + name_of(c->read) + " read this shared memory");
    }
}

static void note_use(const thread &t, size_t at, size_t bytes, bool writes, bool copies = false) {
    for (cell *c = &block.cells[at], *end = c + bytes; c < end; c++) {
        use &u = writes ? c->wrote : c->read;
        unsigned who = copies ? (unsigned)COPY : t.id;
        if (!writes && u.epoch == t.epoch && u.who != t.id)
            who = warp_of(u) == (int)t.id / 32 ? SEVERAL | t.id / 32 : (unsigned)MANY;
        u = { t.epoch, (uint16_t)who, (uint16_t)t.warp_syncs };
    }
}

/* ---- addresses ---- */

static char *inside(thread &t, const instruction &i, uint64_t at, uint64_t begin, char *memory, size_t size,
                    size_t bytes, const char *what) {
    if (at < begin || at + bytes > begin + size)
        stop(t, i, hex(at - begin) + " is outside of the " + std::to_string(size) + " bytes of " + what);
    return memory + (at - begin);
}

/* Where `bytes` at an operand's address are, after all checks. */
static char *find(thread &t, const instruction &i, space in, int operand, int which, size_t bytes,
                  bool writes) {
    uint64_t at = t.get<uint64_t>(i.slot[operand]) + (uint64_t)(int64_t)i.offset[which];
    if (in == GENERIC)
        in = (at & WINDOW) == SHARED_WINDOW ? SHARED : (at & WINDOW) == LOCAL_WINDOW ? LOCAL : GLOBAL;
    if (at % bytes)
        stop(t, i, hex(at) + " is not a multiple of " + std::to_string(bytes));
    if (in == PARAM)
        return inside(t, i, at, PARAM_AT, const_cast<char *>(t.params), t.k->params, bytes, "parameters");
    if (in == LOCAL)
        return inside(t, i, (uint32_t)at, LOCAL_AT, t.local.data(), t.k->local, bytes, "local memory");
    if (in == SHARED) {
        char *found =
            inside(t, i, (uint32_t)at, shared_at(*t.k), t.shared, t.k->shared, bytes, "shared memory");
        check_order(t, i, (size_t)(found - t.shared), bytes, writes);
        note_use(t, (size_t)(found - t.shared), bytes, writes);
        return found;
    }
    if (!t.hooks->is_global(at, bytes))
        stop(t, i, hex(at) + " is outside of global memory");
    return (char *)at;
}

template <class T, int N> static void load(thread &t, const instruction &i) {
    T x[N];
    memcpy(x, find(t, i, i.in, N, 0, sizeof x, false), sizeof x);
    for (int k = 0; k < N; k++)
        t.put_wide(i.slot[k], x[k]);
}

template <class T, int N> static void store(thread &t, const instruction &i) {
    T x[N];
    for (int k = 0; k < N; k++)
        x[k] = t.get<T>(i.slot[1 + k]);
    memcpy(find(t, i, i.in, 0, 0, sizeof x, true), x, sizeof x);
}

/* An address of one space as a pointer, and back. */
template <uint64_t window> static void to_generic(thread &t, const instruction &i) {
    t.put<uint64_t>(i.slot[0], window | (uint32_t)t.get<uint64_t>(i.slot[1]));
}
template <uint64_t window> static void from_generic(thread &t, const instruction &i) {
    const uint64_t at = t.get<uint64_t>(i.slot[1]);
    if ((at & WINDOW) != window)
        stop(t, i, hex(at) + " is an address of another space");
    t.put<uint64_t>(i.slot[0], window ? (uint32_t)at : at);
}

/* A copy is made as late as it may be; until then nobody may use where it goes. */
static void copy_async(thread &t, const instruction &i) {
    const size_t bytes = t.get<uint64_t>(i.slot[2]);
    char *to = find(t, i, SHARED, 0, 0, bytes, true);
    t.copies.push_back({ to, find(t, i, GLOBAL, 1, 1, bytes, false), bytes, t.groups });
    note_use(t, (size_t)(to - t.shared), bytes, true, true);
}
/* The ISA does not say what comes of an address outside of memory, so there may be none. */
static void prefetch(thread &t, const instruction &i) { find(t, i, GLOBAL, 0, 0, 1, false); }
static void commit_copies(thread &t, const instruction &) { t.groups++; }
static void wait_copies(thread &t, const instruction &i) {
    const int done = t.groups - t.get<int32_t>(i.slot[0]);
    const auto left = std::stable_partition(t.copies.begin(), t.copies.end(),
                                            [=](const copy &c) { return c.group < done; });
    for (auto c = t.copies.begin(); c != left; c++) {
        memcpy(c->to, c->from, c->bytes);
        note_use(t, (size_t)(c->to - t.shared), c->bytes, true);
    }
    t.copies.erase(t.copies.begin(), left);
}

/* ---- threads that wait for each other ---- */

/* All threads of a warp come to the same barrier, since it is an aligned one. */
static void block_barrier(thread &t, const instruction &i) {
    t.waits[t.epoch & 1] = &i;
    t.hooks->barrier();
    const instruction *first = t.lane(0).waits[t.epoch & 1];
    if (first != &i)
        stop(t, i, "the first thread of its warp is at the barrier of line " + std::to_string(first->line));
    block.last = std::max(block.last, ++t.epoch);
}

static void warp_barrier(thread &t, const instruction &i) {
    t.warp_mask = t.get<uint32_t>(i.slot[0]);
    t.meets = &i;
    t.hooks->sync_warp(t.warp_mask);
    t.warp_syncs++;
}

/* Gives operands [first, first + n) to the threads of `mask`, who have come to the same instruction. */
static void give(thread &t, const instruction &i, uint32_t mask, int first, int n) {
    if (!(mask >> t.id % 32 & 1))
        stop(t, i, "its mask " + hex(mask) + " is without this thread");
    for (int k = 0; k < n; k++)
        t.given[k] = t.get<uint32_t>(i.slot[first + k]);
    t.meets = &i;
    t.hooks->sync_warp(mask);
    for (unsigned lane = 0; lane < 32; lane++)
        if (mask >> lane & 1 && t.lane(lane).meets != &i)
            stop(t, i,
                 "thread " + std::to_string(lane) + " of its warp is at line "
                     + std::to_string(t.lane(lane).meets->line));
}

enum shuffle_kind { UP, DOWN, BUTTERFLY, INDEX };
/* d|p, a, lane, clamp and mask of a segment, members */
template <shuffle_kind kind> static void shuffle(thread &t, const instruction &i) {
    const int lane = (int)t.id % 32, b = t.get<int32_t>(i.slot[3]) & 31,
              clamp = t.get<int32_t>(i.slot[4]) & 31, segment = t.get<int32_t>(i.slot[4]) >> 8 & 31,
              last = (lane & segment) | (clamp & ~segment);
    const uint32_t mask = t.get<uint32_t>(i.slot[5]);
    int from = kind == UP          ? lane - b
               : kind == DOWN      ? lane + b
               : kind == BUTTERFLY ? lane ^ b
                                   : (lane & segment) | (b & ~segment);
    const bool within = kind == UP ? from >= last : from <= last;
    from = within ? from : lane;
    if (!(mask >> from & 1))
        stop(t, i, "thread " + std::to_string(from) + " is not in its mask " + hex(mask));
    give(t, i, mask, 2, 1);
    const uint32_t x = t.lane((unsigned)from).given[0];
    t.hooks->sync_warp(mask);
    t.put(i.slot[0], x);
    t.put(i.slot[1], within);
}

/* d = c + a (16 x K, u8) b (K x 8, s8), a row of a and a column of b by the ISA's fragments: element i of a
 * thread with group = lane / 4 and member = lane % 4 is
 *     a: row group, or group + 8 where i is in the second or fourth register (K 32), or in the second (K 16);
 *        column 4 member + i % 4, and 16 more in the third and fourth
 *     b: row 4 member + i % 4, and 16 more in the second register; column group
 *     c, d: row group, or group + 8 for i of 2 and 3; column 2 member + i % 2  */
template <int K> static void multiply_matrices(thread &t, const instruction &i) {
    enum { A = K / 8, B = K / 16, FIRST_A = 4, FIRST_C = FIRST_A + A + B };
    const unsigned group = t.id % 32 / 4, member = t.id % 4;
    int32_t d[4];
    give(t, i, UINT32_MAX, FIRST_A, A + B);
    for (unsigned e = 0; e < 4; e++) {
        const unsigned row = group + (e < 2 ? 0 : 8), column = 2 * member + (e & 1);
        d[e] = t.get<int32_t>(i.slot[FIRST_C + e]);
        for (unsigned k = 0; k < K; k++) {
            const uint32_t *a = t.lane(4 * (row % 8) + k % 16 / 4).given,
                           *b = t.lane(4 * column + k % 16 / 4).given;
            const uint8_t x = (uint8_t)(a[row / 8 + 2 * (k / 16)] >> 8 * (k % 4));
            d[e] += x * (int8_t)(b[A + k / 16] >> 8 * (k % 4));
        }
    }
    t.hooks->sync_warp(UINT32_MAX);
    for (int e = 0; e < 4; e++)
        t.put(i.slot[e], d[e]);
}

/* ---- control ---- */

static void branch(thread &t, const instruction &i) { t.next = t.k->code.data() + i.offset[0]; }
static void end(thread &t, const instruction &) { t.next = NULL; }
static void trap(thread &t, const instruction &i) { stop(t, i, "a trap"); }
static void stop_unknown(thread &t, const instruction &i) {
    stop(t, i, "an instruction or operand that tests/cuda/ptx_run.cpp does not know");
}

template <bool wanted> static void skip(thread &t, const instruction &i) {
    t.next += t.get<bool>(i.slot[0]) != wanted;
}
handler skip_unless(bool wanted) { return wanted ? skip<true> : skip<false>; }
handler unknown() { return stop_unknown; }

/* ---- arithmetic ---- */

/* What a GPU's operations make of NaN: one and the same. */
static float plain(float x) {
    const uint32_t bits = 0x7fffffff;
    if (x != x)
        memcpy(&x, &bits, sizeof x);
    return x;
}
static double plain(double x) { return x != x ? (double)NAN : x; }

template <class T> static T smaller(T a, T b) {
    return a != a ? b : b != b || a < b || (a == b && std::signbit(a)) ? a : b;
}
template <class T> static T larger(T a, T b) {
    return a != a ? b : b != b || a > b || (a == b && !std::signbit(a)) ? a : b;
}

template <class T> static T magnitude(T a) { return std::is_signed<T>::value && a < T(1) ? (T)-a : a; }
template <class T> static T quotient(T a, T b) {
    return !b ? (T)-1 : b == (T)-1 && (T)-1 < 0 ? (T)-a : (T)(a / b);
}
template <class T> static T shift_left(T a, uint32_t n) { return n < 8 * sizeof(T) ? (T)(a << n) : 0; }
template <class T> static T shift_right(T a, uint32_t n) {
    return (T)(a >> std::min<uint32_t>(n, 8 * sizeof(T) - 1)) * (T)(n < 8 * sizeof(T) || (T)-1 < 0);
}

static uint32_t choose_bytes(uint32_t a, uint32_t b, uint32_t which) {
    uint32_t chosen = 0;
    for (int i = 0; i < 4; i++) {
        const uint32_t nibble = which >> 4 * i & 15;
        const uint8_t byte = (uint8_t)(((uint64_t)b << 32 | a) >> 8 * (nibble & 7));
        chosen |= (uint32_t)(nibble & 8 ? (byte & 0x80 ? 0xff : 0) : byte) << 8 * i;
    }
    return chosen;
}

/* The table of a function of three bits, for each bit. */
static uint32_t look_up(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
    uint32_t found = 0;
    for (int i = 0; i < 32; i++)
        found |= (table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i;
    return found;
}

template <class A, class B> static int32_t dot(uint32_t a, uint32_t b, int32_t c) {
    for (int i = 0; i < 4; i++)
        c += (A)(a >> 8 * i) * (B)(b >> 8 * i);
    return c;
}

/* `n` bits of a at `from`; of b, with those of a put in at `to`. */
template <class T> static uint64_t low_bits(T n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }
template <class T> static T extract(T a, uint32_t from, uint32_t n) {
    const uint32_t width = 8 * sizeof(T), begin = from & 255, count = n & 255,
                   sign = std::min(begin + count, width) - 1;
    const T ones = count && (T)-1 < 0 && a >> sign & 1 ? (T)-1 : 0;
    const uint64_t bits =
        begin < width ? (uint64_t)a >> begin & low_bits(count) : (uint64_t)ones & low_bits(count);
    return count >= width || !ones ? (T)bits
                                   : (T)(bits | ~low_bits(std::min(count, width - std::min(begin, width))));
}
template <class T> static T insert(T a, T b, uint32_t to, uint32_t n) {
    const uint64_t mask = (to & 255) < 64 ? low_bits(n & 255) << (to & 255) : 0;
    return (T)((b & ~mask) | ((to & 255) < 64 ? (uint64_t)a << (to & 255) & mask : 0));
}

/* ---- conversions ---- */

enum rounding { NEAREST_EVEN, TO_ZERO, DOWNWARD, UPWARD };
static const char *const integer_roundings[] = { "rni", "rzi", "rmi", "rpi" };

template <class T> static T rounded(T x, rounding how) {
    return how == NEAREST_EVEN ? std::nearbyint(x)
           : how == TO_ZERO    ? std::trunc(x)
           : how == DOWNWARD   ? std::floor(x)
                               : std::ceil(x);
}

/* Beyond the integers: the nearest one; NaN: 0. */
template <class D, class S, rounding how> static void float_to_integer(thread &t, const instruction &i) {
    const double x = (double)rounded(t.get<S>(i.slot[1]), how),
                 end = ldexp(1.0, std::numeric_limits<D>::digits);
    t.put_wide(i.slot[0], x != x                                      ? D(0)
                          : x >= end                                  ? std::numeric_limits<D>::max()
                          : x < (double)std::numeric_limits<D>::min() ? std::numeric_limits<D>::min()
                                                                      : (D)x);
}
template <class T, rounding how> static void float_to_whole(thread &t, const instruction &i) {
    t.put(i.slot[0], plain(rounded(t.get<T>(i.slot[1]), how)));
}
template <class D, class S> static void convert(thread &t, const instruction &i) {
    t.put_wide(i.slot[0], (D)t.get<S>(i.slot[1]));
}
template <class D, class S> static void convert_float(thread &t, const instruction &i) {
    t.put(i.slot[0], plain((D)t.get<S>(i.slot[1])));
}

static void half_to_float(thread &t, const instruction &i) {
    const uint16_t h = t.get<uint16_t>(i.slot[1]);
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    const float x = exponent == 31 ? (mantissa ? NAN : INFINITY)
                    : exponent     ? ldexpf((float)(1024 + mantissa), exponent - 25)
                                   : ldexpf((float)mantissa, -24);
    t.put(i.slot[0], plain(h >> 15 ? -x : x));
}
static void float_to_half(thread &t, const instruction &i) {
    const float x = t.get<float>(i.slot[1]), size = fabsf(x);
    int exponent = 0;
    frexpf(size, &exponent); /* size is in [2^(exponent - 1), 2^exponent) */
    const int unit = size > 0 ? std::max(exponent - 11, -24) : -24;
    const double units = std::nearbyint(ldexp((double)size, -unit));
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const uint16_t h = x != x          ? 0x7fff
                       : size >= 65520 ? (uint16_t)(sign | 0x7c00)
                                       : (uint16_t)(sign | (uint16_t)((unit + 24) * 1024 + (int)units));
    t.put_wide(i.slot[0], h);
}

/* ---- the table ---- */

#define TO(T, slot_, x) t.put<T>(i.slot[slot_], (T)(x))
#define ONE(T, x) [](thread &t, const instruction &i) { const T a = t.get<T>(i.slot[1]); TO(T, 0, x); }
#define TWO(D, T, x) \
    [](thread &t, const instruction &i) { \
        const T a = t.get<T>(i.slot[1]), b = t.get<T>(i.slot[2]); TO(D, 0, x); \
    }
#define THREE(D, A, C, x) \
    [](thread &t, const instruction &i) { \
        const A a = t.get<A>(i.slot[1]), b = t.get<A>(i.slot[2]); \
        const C c = t.get<C>(i.slot[3]); TO(D, 0, x); \
    }
#define SHIFT(T, x) \
    [](thread &t, const instruction &i) { \
        const T a = t.get<T>(i.slot[1]); const uint32_t n = t.get<uint32_t>(i.slot[2]); TO(T, 0, x); \
    }
#define SELECT(T) \
    [](thread &t, const instruction &i) { TO(T, 0, t.get<T>(i.slot[t.get<bool>(i.slot[3]) ? 1 : 2])); }
#define FOUR(T, N, x) \
    [](thread &t, const instruction &i) { \
        const T a = t.get<T>(i.slot[1]); const N b = t.get<N>(i.slot[2]); \
        const uint32_t c = t.get<uint32_t>(i.slot[3]), d = t.get<uint32_t>(i.slot[4]); TO(T, 0, x); \
    }

/* Without .rn a sum and a product may become one operation: those are not in the table. */
#define FLOATS(name, T, fused) \
    { "add.rn." #name, TWO(T, T, plain(a + b)) }, { "sub.rn." #name, TWO(T, T, plain(a - b)) }, \
    { "mul.rn." #name, TWO(T, T, plain(a * b)) }, \
    { "div.rn." #name, TWO(T, T, plain(a / b)) }, { "rcp.rn." #name, ONE(T, plain(1 / a)) }, \
    { "sqrt.rn." #name, ONE(T, plain(std::sqrt(a))) }, \
    { "fma.rn." #name, THREE(T, T, T, plain(fused(a, b, c))) }, \
    { "min." #name, TWO(T, T, plain(smaller(a, b))) }, \
    { "max." #name, TWO(T, T, plain(larger(a, b))) }, { "abs." #name, ONE(T, std::fabs(a)) }, \
    { "neg." #name, ONE(T, -a) }, \
    { "setp.equ." #name, TWO(bool, T, !(a < b || a > b)) }, { "setp.neu." #name, TWO(bool, T, a != b) }, \
    { "setp.ltu." #name, TWO(bool, T, !(a >= b)) }, { "setp.leu." #name, TWO(bool, T, !(a > b)) }, \
    { "setp.gtu." #name, TWO(bool, T, !(a <= b)) }, { "setp.geu." #name, TWO(bool, T, !(a < b)) }, \
    { "setp.num." #name, TWO(bool, T, a == a && b == b) }, \
    { "setp.nan." #name, TWO(bool, T, a != a || b != b) }, \
    { "setp.ne." #name, TWO(bool, T, a < b || a > b) }, COMPARED(name, T)
#define COMPARED(name, T) \
    { "setp.eq." #name, TWO(bool, T, a == b) }, { "setp.lt." #name, TWO(bool, T, a < b) }, \
    { "setp.le." #name, TWO(bool, T, a <= b) }, \
    { "setp.gt." #name, TWO(bool, T, a > b) }, { "setp.ge." #name, TWO(bool, T, a >= b) }, ANY(name, T)
#define ANY(name, T) { "mov." #name, ONE(T, a) }, { "selp." #name, SELECT(T) }
#define INTEGERS(name, T) \
    { "add." #name, TWO(T, T, a + b) }, { "sub." #name, TWO(T, T, a - b) }, \
    { "mul.lo." #name, TWO(T, T, a * b) }, \
    { "mad.lo." #name, THREE(T, T, T, a * b + c) }, { "div." #name, TWO(T, T, quotient(a, b)) }, \
    { "rem." #name, TWO(T, T, b ? a - quotient(a, b) * b : a) }, \
    { "min." #name, TWO(T, T, std::min(a, b)) }, \
    { "max." #name, TWO(T, T, std::max(a, b)) }, { "neg." #name, ONE(T, -a) }, \
    { "abs." #name, ONE(T, magnitude(a)) }, \
    { "shr." #name, SHIFT(T, shift_right(a, n)) }, \
    { "setp.ne." #name, TWO(bool, T, a != b) }, COMPARED(name, T)
#define WIDE(name, T, D) \
    { "mul.wide." #name, TWO(D, T, (D)a * (D)b) }, { "mad.wide." #name, THREE(D, T, D, (D)a * (D)b + c) }, \
    { "mul.hi." #name, TWO(T, T, (D)a * (D)b >> 8 * sizeof(T)) }
#define FIELDS(name, T) { "bfe." #name, THREE(T, T, uint32_t, extract(a, (uint32_t)b, c)) }
#define BITS(name, T) \
    { "and." #name, TWO(T, T, a & b) }, { "or." #name, TWO(T, T, a | b) }, \
    { "xor." #name, TWO(T, T, a ^ b) }, { "not." #name, ONE(T, ~a) }, \
    { "shl." #name, SHIFT(T, shift_left(a, n)) }, { "shr." #name, SHIFT(T, shift_right(a, n)) }, \
    { "bfi." #name, FOUR(T, T, insert(a, b, c, d)) }, \
    { "setp.eq." #name, TWO(bool, T, a == b) }, { "setp.ne." #name, TWO(bool, T, a != b) }, ANY(name, T)
#define PAIRS(name, T, H) \
    { "mov." #name ".split", [](thread &t, const instruction &i) { \
          const T a = t.get<T>(i.slot[2]); TO(H, 0, a), TO(H, 1, a >> 8 * sizeof(H)); } }, \
    { "mov." #name ".join", TWO(T, H, (T)b << 8 * sizeof(H) | a) }
#define FUNNEL(name, x) { "shf." #name ".b32", THREE(uint32_t, uint32_t, uint32_t, (x)) }
#define PAIR (((uint64_t)b << 32) | a)
#define DOT(name, A, B) { "dp4a." #name, THREE(int32_t, uint32_t, int32_t, (dot<A, B>(a, b, c))) }

using table = std::unordered_map<std::string, handler>;

template <class T> static void add_accesses(table &to, const char *type) {
    const std::string t = std::string(".") + type;
    to["ld" + t] = load<T, 1>, to["st" + t] = store<T, 1>;
    to["ld.v2" + t] = load<T, 2>, to["st.v2" + t] = store<T, 2>;
    to["ld.v4" + t] = load<T, 4>, to["st.v4" + t] = store<T, 4>;
}

template <class F, rounding how> static void add_roundings(table &to, const std::string &f) {
    const std::string name = std::string("cvt.") + integer_roundings[how];
    to[name + ".s32." + f] = float_to_integer<int32_t, F, how>,
                        to[name + ".u32." + f] = float_to_integer<uint32_t, F, how>;
    to[name + ".s64." + f] = float_to_integer<int64_t, F, how>,
                        to[name + ".u64." + f] = float_to_integer<uint64_t, F, how>;
    to[name + "." + f + "." + f] = float_to_whole<F, how>;
}

template <class S> static void add_conversions(table &to, const std::string &s) {
    to["cvt.u8." + s] = convert<uint8_t, S>, to["cvt.s8." + s] = convert<int8_t, S>;
    to["cvt.u16." + s] = convert<uint16_t, S>, to["cvt.s16." + s] = convert<int16_t, S>;
    to["cvt.u32." + s] = convert<uint32_t, S>, to["cvt.s32." + s] = convert<int32_t, S>;
    to["cvt.u64." + s] = convert<uint64_t, S>, to["cvt.s64." + s] = convert<int64_t, S>;
    to["cvt.rn.f32." + s] = convert<float, S>, to["cvt.rn.f64." + s] = convert<double, S>;
}

static table make_table() {
    table all = {
        FLOATS(f32, float, fmaf), FLOATS(f64, double, fma),
        INTEGERS(s16, int16_t), INTEGERS(u16, uint16_t), INTEGERS(s32, int32_t), INTEGERS(u32, uint32_t),
        INTEGERS(s64, int64_t), INTEGERS(u64, uint64_t),
        WIDE(s16, int16_t, int32_t), WIDE(u16, uint16_t, uint32_t), WIDE(s32, int32_t, int64_t),
        WIDE(u32, uint32_t, uint64_t),
        FIELDS(s32, int32_t), FIELDS(u32, uint32_t),
        BITS(b16, uint16_t), BITS(b32, uint32_t), BITS(b64, uint64_t),
        PAIRS(b32, uint32_t, uint16_t), PAIRS(b64, uint64_t, uint32_t),
        { "and.pred", TWO(bool, bool, a && b) }, { "or.pred", TWO(bool, bool, a || b) },
        { "xor.pred", TWO(bool, bool, a != b) },
        { "not.pred", ONE(bool, !a) }, { "mov.pred", ONE(bool, a) },
        FUNNEL(l.wrap, PAIR << (c & 31) >> 32), FUNNEL(r.wrap, PAIR >> (c & 31)),
        FUNNEL(l.clamp, PAIR << std::min(c, 32u) >> 32), FUNNEL(r.clamp, PAIR >> std::min(c, 32u)),
        { "prmt.b32", THREE(uint32_t, uint32_t, uint32_t, choose_bytes(a, b, c)) },
        { "lop3.b32", FOUR(uint32_t, uint32_t, look_up(a, b, c, d)) },
        { "clz.b32", ONE(uint32_t, a ? __builtin_clz(a) : 32) },
        { "popc.b32", ONE(uint32_t, __builtin_popcount(a)) },
        DOT(u32.u32, uint8_t, uint8_t), DOT(u32.s32, uint8_t, int8_t), DOT(s32.u32, int8_t, uint8_t),
        DOT(s32.s32, int8_t, int8_t),
        { "cvt.rn.f32.f64", convert_float<float, double> }, { "cvt.f64.f32", convert_float<double, float> },
        { "cvt.f32.f16", half_to_float }, { "cvt.rn.f16.f32", float_to_half },
        { "cvta.to.global.u64", from_generic<0> }, { "cvta.global.u64", to_generic<0> },
        { "cvta.to.shared.u64", from_generic<SHARED_WINDOW> },
        { "cvta.shared.u64", to_generic<SHARED_WINDOW> },
        { "cvta.to.local.u64", from_generic<LOCAL_WINDOW> }, { "cvta.local.u64", to_generic<LOCAL_WINDOW> },
        { "cp.async.cg.shared.global", copy_async }, { "cp.async.ca.shared.global", copy_async },
        { "prefetch.global.L2", prefetch },
        { "cp.async.commit_group", commit_copies }, { "cp.async.wait_group", wait_copies },
        { "bar.sync", block_barrier }, { "bar.warp.sync", warp_barrier },
        { "shfl.sync.up.b32", shuffle<UP> }, { "shfl.sync.down.b32", shuffle<DOWN> },
        { "shfl.sync.bfly.b32", shuffle<BUTTERFLY> }, { "shfl.sync.idx.b32", shuffle<INDEX> },
        { "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32", multiply_matrices<32> },
        { "mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32", multiply_matrices<16> },
        { "bra", branch }, { "ret", end }, { "exit", end }, { "trap", trap },
    };
    add_accesses<int8_t>(all, "s8"), add_accesses<uint8_t>(all, "u8"), add_accesses<uint8_t>(all, "b8");
    add_accesses<int16_t>(all, "s16"), add_accesses<uint16_t>(all, "u16"), add_accesses<uint16_t>(all, "b16");
    add_accesses<int32_t>(all, "s32"), add_accesses<uint32_t>(all, "u32"), add_accesses<uint32_t>(all, "b32");
    add_accesses<int64_t>(all, "s64"), add_accesses<uint64_t>(all, "u64"), add_accesses<uint64_t>(all, "b64");
    add_accesses<float>(all, "f32"), add_accesses<double>(all, "f64");
    add_conversions<int8_t>(all, "s8"), add_conversions<uint8_t>(all, "u8");
    add_conversions<int16_t>(all, "s16"), add_conversions<uint16_t>(all, "u16");
    add_conversions<int32_t>(all, "s32"), add_conversions<uint32_t>(all, "u32");
    add_conversions<int64_t>(all, "s64"), add_conversions<uint64_t>(all, "u64");
    add_roundings<float, NEAREST_EVEN>(all, "f32"), add_roundings<float, TO_ZERO>(all, "f32");
    add_roundings<float, DOWNWARD>(all, "f32"), add_roundings<float, UPWARD>(all, "f32");
    add_roundings<double, NEAREST_EVEN>(all, "f64"), add_roundings<double, TO_ZERO>(all, "f64");
    add_roundings<double, DOWNWARD>(all, "f64"), add_roundings<double, UPWARD>(all, "f64");
    return all;
}

handler find_handler(const std::string &name) {
    static const table all = make_table();
    const auto found = all.find(name);
    return found == all.end() ? NULL : found->second;
}

/* ---- a thread ---- */

static void begin_block(const kernel &k, unsigned serial) {
    block.serial = serial;
    if (block.last > UINT32_MAX / 2) {
        block.cells.clear();
        block.last = 0;
    }
    block.first = ++block.last;
    if (block.cells.size() < k.shared)
        block.cells.resize(k.shared);
}

void run(kernel &k, const position &at, const void *params, void *shared, const host &hooks) {
    thread &t = block.threads[at.thread];
    if (k.code.empty())
        decode(k);
    if (block.serial != at.serial)
        begin_block(k, at.serial);
    const unsigned special[9] = { at.thread,  at.block[0], at.block[1], at.block[2],   at.threads,
                                  at.grid[0], at.grid[1],  at.grid[2],  at.thread % 32 };
    std::copy(std::begin(special), std::end(special), t.special);
    t.k = &k, t.hooks = &hooks, t.params = (const char *)params, t.shared = (char *)shared, t.id = at.thread;
    t.epoch = block.first, t.warp_syncs = t.warp_mask = 0;
    t.copies.clear(), t.groups = 0;
    t.local.assign(k.local, (char)0xa5);
    if (t.slots.size() < k.slots)
        t.slots.resize(k.slots);
    t.r = t.slots.data();
    for (const start &s : k.starts)
        t.r[s.slot] = s.special < 0 ? s.value : t.special[s.special];
    for (t.next = k.code.data(); t.next;) {
        const instruction &i = *t.next++;
        i.run(t, i);
    }
}

}
