/* The interpreter of PTX by itself: what instructions give, and what stops a kernel. Needs no nvcc: each test
 * writes its kernel. */
#include "ptx_grid.h"

#define _Static_assert static_assert
#include "types.h"

#include <initializer_list>
#include <tuple>

static int n_checks, n_bad;

static void expect(const char *what, bool holds, const std::string &found) {
    n_checks++;
    n_bad += !holds;
    if (!holds)
        printf("%s: %s\n", what, found.c_str());
}

/* A kernel of one parameter, the address of `out`, which is in %rd1, with %r1 = the thread's number and %rd2 =
 * where its 64 bits of `out` are. */
static std::string kernel_of(const std::string &body, const char *shared) {
    return std::string(".target sm_80\n.visible .entry k(\n\t.param .align 8 .b8 k_param_0[8]\n)\n{\n") + shared
           + "\tld.param.u64 %rd1, [k_param_0];\n\tmov.u32 %r1, %tid.x;\n\tmul.wide.u32 %rd2, %r1, 8;\n"
             "\tadd.s64 %rd2, %rd2, %rd1;\n" + body + "\tret;\n}\n";
}

/* What goes wrong when it runs, or nothing. */
static std::string run(const std::string &body, uint64_t *out, unsigned threads = 32,
                       const char *shared = "\t.shared .align 8 .b8 _Zs[256];\n") {
    ptx_module module;
    const std::string wrong = ptx_load("test", kernel_of(body, shared), module);
    return wrong.empty() ? grid_launch(module.find("k"), { 1, 1, 1 }, threads, &out) : wrong;
}

/* ---- what instructions give ---- */

/* One instruction of a thread, with %rd3 and %rd4 as operands, whose result is %rd5. */
static uint64_t result(const std::string &code, uint64_t a, uint64_t b = 0) {
    uint64_t out[3] = { 0, a, b };
    const std::string wrong =
        run("\tld.global.u64 %rd3, [%rd1+8];\n\tld.global.u64 %rd4, [%rd1+16];\n\tmov.u64 %rd5, 0;\n\t" + code
                + "\n\tst.global.u64 [%rd1], %rd5;\n", out, 1);
    expect(code.c_str(), wrong.empty(), wrong);
    return out[0];
}

static void gives(const char *code, uint64_t a, uint64_t b, uint64_t right) {
    const uint64_t found = result(code, a, b);
    char line[100];
    snprintf(line, sizeof line, "expected %#llx, found %#llx", (unsigned long long)right, (unsigned long long)found);
    expect(code, found == right, line);
}

static uint64_t f(float x) { return f32_bits(x); }

static void arithmetic(void) {
    gives("add.s32 %rd5, %rd3, %rd4;", 0x7fffffff, 1, 0x80000000);
    gives("mul.wide.s32 %rd5, %rd3, %rd4;", 0xffffffff, 5, (uint64_t)-5);
    gives("mul.hi.u32 %rd5, %rd3, %rd4;", 0xffffffff, 0xffffffff, 0xfffffffe);
    gives("mad.lo.s32 %rd5, %rd3, %rd4, -1;", 7, 6, 41);
    gives("div.s32 %rd5, %rd3, %rd4;", (uint32_t)-7, 2, (uint32_t)-3);
    gives("div.s32 %rd5, %rd3, %rd4;", 0x80000000, 0xffffffff, 0x80000000);
    gives("rem.s32 %rd5, %rd3, %rd4;", (uint32_t)-7, 2, (uint32_t)-1);
    gives("shl.b32 %rd5, %rd3, %rd4;", 1, 32, 0);
    gives("shr.u32 %rd5, %rd3, %rd4;", 0x80000000, 40, 0);
    gives("shr.s32 %rd5, %rd3, %rd4;", 0x80000000, 40, 0xffffffff);
    gives("shf.l.wrap.b32 %rd5, %rd3, %rd4, 4;", 0xf0000001, 0x2, 0x2f);
    gives("prmt.b32 %rd5, %rd3, %rd4, 0x7b20;", 0x83020100, 0x07060504, 0x07ff0200);
    gives("lop3.b32 %rd5, %rd3, %rd4, 0xff00, 0xe8;", 0xf0f0, 0xcccc, 0xfcc0);
    gives("bfi.b32 %rd5, %rd3, %rd4, 4, 8;", 0xab, 0xffffffff, 0xfffffabf);
    gives("bfe.u32 %rd5, %rd3, 4, 8;", 0xfab5, 0, 0xab);
    gives("bfe.s32 %rd5, %rd3, 4, 8;", 0xfab5, 0, 0xffffffab);
    gives("dp4a.u32.s32 %rd5, %rd3, %rd4, 1000;", 0xff010203, 0xff010203, 1000 - 255 + 1 + 4 + 9);
    gives("clz.b32 %rd5, %rd3;", 0x00010000, 0, 15);
    gives("mov.b64 %rd5, {%rd4, %rd3};", 1, 2, 0x100000002);
    gives("{ .reg .b64 %tmp; mov.b64 {%tmp, %rd5}, %rd3; }", 0x500000006, 0, 5);
    gives("selp.b32 %rd5, %rd3, %rd4, 0;", 1, 2, 2);
    gives("prefetch.global.L2 [%rd1+17]; add.s64 %rd5, %rd3, 1;", 1, 0, 2);
    gives("setp.lt.s32 %p1, %rd3, %rd4; @!%p1 bra $end; add.s64 %rd5, %rd3, 1;\n$end:", 1, 2, 2);
    gives("setp.lt.s32 %p1, %rd3, %rd4; @!%p1 add.s64 %rd5, %rd3, 1;", 5, 4, 6);
    gives("setp.lt.s32 %p1, %rd3, %rd4; @%p1 add.s64 %rd5, %rd3, 1;", 5, 4, 0);
}

static void floats(void) {
    const uint64_t nan = 0x7fffffff, quiet = 0xffc00001;
    gives("fma.rn.f32 %rd5, %rd3, %rd4, 0fBF800000;", f(1 + 0x1p-12f), f(1 - 0x1p-12f), f(-0x1p-24f));
    gives("div.rn.f32 %rd5, %rd3, %rd4;", f(1), f(3), f(1.0f / 3));
    gives("min.f32 %rd5, %rd3, %rd4;", quiet, f(1), f(1));
    gives("min.f32 %rd5, %rd3, %rd4;", f(0.0f), f(-0.0f), f(-0.0f));
    gives("max.f32 %rd5, %rd3, %rd4;", f(-0.0f), f(0.0f), f(0.0f));
    gives("add.rn.f32 %rd5, %rd3, %rd4;", quiet, f(1), nan);
    gives("cvt.rni.f32.f32 %rd5, %rd3;", f(2.5f), 0, f(2));
    gives("cvt.rzi.s32.f32 %rd5, %rd3;", f(-2.9f), 0, (uint64_t)-2);
    gives("cvt.rzi.s32.f32 %rd5, %rd3;", f(1e20f), 0, 0x7fffffff);
    gives("cvt.rzi.s32.f32 %rd5, %rd3;", quiet, 0, 0);
    gives("cvt.rn.f32.s32 %rd5, %rd3;", 16777217, 0, f(16777216));
    gives("cvt.s64.s32 %rd5, %rd3;", 0xffffffff, 0, ~0ull);
    gives("cvt.u32.u64 %rd5, %rd3;", 0x1ffffffff, 0, 0xffffffff);
    for (const auto &[name, less, same, unordered] : std::initializer_list<std::tuple<const char *, int, int, int>>{
             { "lt", 1, 0, 0 }, { "ltu", 1, 0, 1 }, { "eq", 0, 1, 0 }, { "equ", 0, 1, 1 }, { "ne", 1, 0, 0 }, { "neu", 1, 0, 1 },
             { "ge", 0, 1, 0 }, { "geu", 0, 1, 1 }, { "num", 1, 1, 0 }, { "nan", 0, 0, 1 } }) {
        const std::string code = std::string("setp.") + name + ".f32 %p1, %rd3, %rd4; selp.u64 %rd5, 1, 0, %p1;";
        gives(code.c_str(), f(1), f(2), (uint64_t)less);
        gives(code.c_str(), f(2), f(2), (uint64_t)same);
        gives(code.c_str(), quiet, f(2), (uint64_t)unordered);
    }
}

/* All halves, and floats between them and beside the middle of two. */
static void halves(void) {
    int wrong = 0;
    for (uint32_t h = 0; h < 0x10000; h += 3) {
        const float x = f16_to_f32((uint16_t)h);
        if (x != x)
            continue;
        wrong += result("cvt.f32.f16 %rd5, %rd3;", h) != f(x);
        for (int by = -1; by <= 1 && h % 8 == 0; by++) {
            const float near = f32_from_bits(f32_bits(x) + 0x1000 + (uint32_t)by);
            wrong += near == near && result("cvt.rn.f16.f32 %rd5, %rd3;", f(near)) != f32_to_f16(near);
        }
    }
    expect("cvt of halves", !wrong, std::to_string(wrong) + " are others");
    gives("cvt.rn.f16.f32 %rd5, %rd3;", f(0.0f), 0, 0);
    gives("cvt.rn.f16.f32 %rd5, %rd3;", f(-65520.0f), 0, 0xfc00);
    gives("cvt.rn.f16.f32 %rd5, %rd3;", 0xffc00001, 0, 0x7fff);
}

static void shuffles(void) {
    uint64_t out[32];
    for (int width : { 32, 16 }) {
        const std::string clamp = width == 32 ? "31" : "4127";
        const std::string wrong = run("\tshfl.sync.bfly.b32 %r2|%p1, %r1, 5, " + clamp + ", -1;\n\tshfl.sync.down.b32 %r3|%p2, %r1, 3, "
                                          + clamp + ", -1;\n\tselp.u32 %r4, %r3, 99, %p2;\n\tst.global.v2.u32 [%rd2], {%r2, %r4};\n", out);
        bool same = wrong.empty();
        for (int i = 0; i < 32; i++)
            same &= out[i] == ((uint64_t)(i % width + 3 < width ? i + 3 : 99) << 32 | (uint64_t)(i ^ 5));
        expect("shuffles", same, wrong);
    }
}

/* Matrices of which each thread holds what the ISA's figures say: element (row, column) of a is in byte column % 4
 * of a register of thread 4 (row % 8) + column % 16 / 4, and so on. d goes where a was. */
static void matrices(int K) {
    struct alignas(16) { uint32_t a[4], b[2], unused[2]; } lanes[32] = {};
    uint8_t a[16][32];
    int8_t b[32][8];
    for (int k = 0; k < K; k++) {
        for (int row = 0; row < 16; row++) {
            a[row][k] = (uint8_t)(37 * row + 101 * k + 7);
            lanes[4 * (row % 8) + k % 16 / 4].a[row / 8 + 2 * (k / 16)] |= (uint32_t)a[row][k] << 8 * (k % 4);
        }
        for (int column = 0; column < 8; column++) {
            b[k][column] = (int8_t)(53 * column + 29 * k + 3);
            lanes[4 * column + k % 16 / 4].b[k / 16] |= (uint32_t)(uint8_t)b[k][column] << 8 * (k % 4);
        }
    }
    const std::string wrong = run(
        "\tmul.wide.u32 %rd2, %r1, 32;\n\tadd.s64 %rd2, %rd2, %rd1;\n\tld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd2];\n"
        "\tld.global.v2.u32 {%r14, %r15}, [%rd2+16];\n\tmov.u32 %r20, 1000;\n\tmma.sync.aligned.m16n8k"
            + std::string(K == 32 ? "32.row.col.s32.u8.s8.s32 {%r20,%r21,%r22,%r23}, {%r10,%r11,%r12,%r13}, {%r14,%r15}"
                                  : "16.row.col.s32.u8.s8.s32 {%r20,%r21,%r22,%r23}, {%r10,%r11}, {%r14}")
            + ", {%r20,%r20,%r20,%r20};\n\tst.global.v4.u32 [%rd2], {%r20, %r21, %r22, %r23};\n",
        (uint64_t *)lanes);
    bool same = wrong.empty();
    for (int row = 0; row < 16; row++)
        for (int column = 0; column < 8; column++) {
            int32_t right = 1000;
            for (int k = 0; k < K; k++)
                right += a[row][k] * b[k][column];
            same &= (int32_t)lanes[4 * (row % 8) + column / 2].a[row / 8 * 2 + column % 2] == right;
        }
    expect("mma", same, wrong.empty() ? "another product" : wrong);
}

/* ---- what stops a kernel ---- */

static void stops(const char *body, const char *why, unsigned threads = 32) {
    uint64_t out[64] = {};
    const std::string found = run(body, out, threads);
    expect(why, found.find(why) != std::string::npos, std::string("\n") + body + "found: " + (found.empty() ? "no fault" : found));
}

static void faults(void) {
    stops("\tld.global.v2.u32 {%r2, %r3}, [%rd1+4];\n", "is not a multiple of 8");
    stops("\tld.global.u32 %r2, [%rd1+2];\n", "is not a multiple of 4");
    stops("\tld.param.u32 %r2, [k_param_0+8];\n", "outside of the 8 bytes of parameters");
    stops("\tmov.u32 %r2, _Zs;\n\tst.shared.u32 [%r2+256], %r1;\n", "outside of the 256 bytes of shared memory");
    stops("\tld.shared.v4.u32 {%r2, %r3, %r4, %r5}, [_Zs];\n", "is not a multiple of 16");
    stops("\tmov.u64 %rd3, _Zs;\n\tcvta.shared.u64 %rd4, %rd3;\n\tcvta.to.global.u64 %rd5, %rd4;\n", "an address of another space");
    stops("\tmov.u64 %rd3, 64;\n\tld.global.u32 %r2, [%rd3];\n", "outside of global memory");
    stops("\tmov.u64 %rd3, 64;\n\tprefetch.global.L2 [%rd3];\n", "outside of global memory");
    stops("\ttrap;\n", "a trap");
    stops("\tadd.f32 %f1, %f2, %f3;\n", "does not know");                   /* it may become a part of an fma */
    stops("\tmov.u64 %rd3, elsewhere;\n", "does not know");
    stops("\tbra $nowhere;\n", "does not know");
    stops("\tsetp.lt.u32 %p1, %r1, 16;\n\t@%p1 bra $low;\n\tbar.sync 0;\n\tbra.uni $end;\n$low:\n\tbar.sync 0;\n$end:\n",
          "is at the barrier of line");
    stops("\tsetp.lt.u32 %p1, %r1, 16;\n\t@%p1 bra $end;\n\tbar.sync 0;\n$end:\n", "a barrier that not all threads reach");
    stops("\tshfl.sync.bfly.b32 %r2|%p1, %r1, 16, 31, 65535;\n", "is not in its mask", 16);
}

#define MINE "\tmov.u32 %r2, _Zs;\n\tshl.b32 %r3, %r1, 2;\n\tadd.s32 %r4, %r2, %r3;\n\txor.b32 %r5, %r3, 4;\n\tadd.s32 %r5, %r2, %r5;\n"
#define RACE "this shared memory"     /* which of two came first is the grid's choice */
#define PUT "\tst.shared.u32 [%r4], %r1;\n"
#define TAKE "\tld.shared.u32 %r6, [%r5];\n"

static void races(void) {
    static const struct { const char *body, *fault; } cases[] = {
        { MINE PUT TAKE, RACE },
        { MINE PUT "\tbar.sync 0;\n" TAKE, "" },
        { MINE PUT "\tbar.warp.sync -1;\n" TAKE, "" },
        { MINE PUT "\tshfl.sync.bfly.b32 %r7|%p1, %r1, 1, 31, -1;\n" TAKE, RACE },
        { MINE PUT "\tbar.sync 0;\n" TAKE PUT, RACE },
        { MINE PUT "\tbar.sync 0;\n" TAKE "\tbar.sync 0;\n" PUT, "" },
        { MINE "\tst.shared.u32 [%r2], %r1;\n", RACE },
        { MINE "\tld.shared.u32 %r6, [%r2];\n\tst.shared.u32 [%r2], %r1;\n", RACE },
        { "\tsetp.ne.s32 %p1, %r1, 0;\n\t@%p1 bra $end;\n\tcp.async.ca.shared.global [_Zs], [%rd1], 8;\n\tcp.async.commit_group;\n"
          "\tld.shared.u32 %r6, [_Zs];\n$end:\n", "a copy not awaited" },
        { "\tsetp.ne.s32 %p1, %r1, 0;\n\t@%p1 bra $end;\n\tcp.async.ca.shared.global [_Zs], [%rd1], 8;\n\tcp.async.commit_group;\n"
          "\tcp.async.wait_group 0;\n\tld.shared.u32 %r6, [_Zs];\n$end:\n", "" },
    };
    for (const auto &c : cases) {
        uint64_t out[64] = {};
        const std::string found = run(c.body, out);
        expect(*c.fault ? c.fault : "no race", *c.fault ? found.find(c.fault) != std::string::npos : found.empty(),
               std::string("\n") + c.body + "found: " + found);
    }
}

static void files(void) {
    ptx_module none, two;
    expect("an empty file", ptx_load("empty", "", none).find("expected PTX") != std::string::npos, "accepted");
    const std::string text = ".target sm_80\n.visible .entry k(\n\t.param .align 8 .b8 a[8],\n\t.param .align 8 .b8 b[8]\n)\n{\n}\n";
    expect("two parameters", ptx_load("two", text, two).find("found a second one") != std::string::npos, "accepted");
    ptx_module cut;
    expect("a part of a file", ptx_load("cut", text.substr(0, 60), cut).find("a part of it") != std::string::npos, "accepted");
}

int main(void) {
    arithmetic();
    floats();
    halves();
    shuffles();
    matrices(16);
    matrices(32);
    faults();
    races();
    files();
    printf("PTX: %d checks, %d wrong\n", n_checks, n_bad);
    return n_bad != 0;
}
