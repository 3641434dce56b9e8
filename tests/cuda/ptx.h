/* PTX on the CPU: what nvcc makes of the kernels, with the memory of a GPU.
 *
 * A kernel's text becomes a list of instructions; each is a function and the numbers of its operands. An
 * operand is a slot of 64 bits of the thread: a register, a constant or a special register, which are all
 * written when the thread starts. A caller runs the threads of a block, each until it waits for others
 * (ptx_grid.h: as fibers of grid.h).
 *
 * A thread stops with a sentence where a GPU would stop or would give a result that depends on luck: an
 * address outside of its memory or that is no multiple of the access, shared memory that two threads use
 * without a barrier between them, a copy that was not awaited, threads of a warp at different barriers, an
 * instruction that is not known here. */
#ifndef PTX_H
#define PTX_H

#include <stddef.h>
#include <stdint.h>
#include <string>
#include <vector>

namespace ptx {

struct thread;
struct instruction;
using handler = void (*)(thread &, const instruction &);

enum { OPERANDS = 14, THREADS = 1024 };

enum space : uint8_t { GENERIC, GLOBAL, SHARED, LOCAL, PARAM };

struct instruction {
    handler run;
    uint16_t slot[OPERANDS];        /* braces and d|p are two operands and more */
    int32_t offset[2];              /* of its addresses; where a branch goes */
    uint32_t line;
    space in;
};

/* What a slot holds when a thread starts: a constant, or `special`: an index of thread::special. */
struct start { uint16_t slot; int8_t special; uint64_t value; };

/* `shared` and `params` are in bytes; `align` is what the text promises for shared memory. */
struct kernel {
    std::string name;
    size_t params = 0, shared = 0, align = 1, local = 0;
    std::string text;               /* of its body, from line `line` of the file on; decoded when it runs */
    unsigned line = 0;
    std::vector<instruction> code;
    std::vector<start> starts;
    unsigned slots = 0;
    std::string file;
};

struct module { int target = 0; std::vector<kernel> kernels; };

/* Reads the text of a file of PTX; what is wrong with it, or nothing. */
std::string read(const std::string &file, const std::string &text, module &to);
void decode(kernel &k);
handler find_handler(const std::string &name);      /* NULL: not known */
handler skip_unless(bool wanted);               /* the next instruction, unless the predicate is `wanted` */
handler unknown();                                  /* stops when it runs */

/* Which thread of which block this is; `serial` tells blocks apart. */
struct position { unsigned serial, thread, threads; unsigned block[3], grid[3]; };

/* What a thread asks of those who run it. */
struct host {
    void (*barrier)();                              /* returns when all threads of the block have come */
    void (*sync_warp)(uint32_t mask);               /* .. those of its warp */
    bool (*is_global)(uint64_t at, size_t bytes);   /* memory that a kernel may use */
    void (*fault)(const std::string &what);         /* does not return */
};

/* Runs a thread to its end. */
void run(kernel &k, const position &at, const void *params, void *shared, const host &host);

/* Addresses. A pointer to shared or local memory has the window in its upper bits; the rest is the address
 * within it. Parameters and shared memory begin at an address that is aligned as the text says and not more.
 */
enum : uint64_t { SHARED_WINDOW = 0x5ull << 56, LOCAL_WINDOW = 0x6ull << 56, WINDOW = 0xffull << 56 };
enum { PARAM_AT = 1024 + 8, LOCAL_AT = 1024 };
inline uint64_t shared_at(const kernel &k) { return 1024 + k.align; }

}

#endif
