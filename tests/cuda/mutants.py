"""Mistakes that the tests of the GPU's kernels have to find: each is made in a copy of the sources, and
test_kernels must fail.

make cuda-mutants: python mutants.py CXX OBJECT.. (a minute or two: each is compiled, for a few tensor types)
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]

# what is wrong, file, text, what it becomes
MUTANTS = [
    ("the largest value of half of the threads", "halves.h",
     "for (int i = 0; i < 2 * WARPS; i++)", "for (int i = 0; i < WARPS; i++)"),
    ("a power of two too many", "halves.h", "(268 - exponent) << 23", "(269 - exponent) << 23"),
    ("the wrong half's scale in f16", "halves.h", "f.halves && g >= 4", "f.halves && g > 4"),
    ("a barrier left out", "products.h",
     "        __syncthreads();\n        if (half_warp() < C)", "        if (half_warp() < C)"),
    ("a barrier in a branch", "rows.h",
     "    __syncthreads();\n    if (t >= 16)", "    if (t < 64) __syncthreads();\n    if (t >= 16)"),
    ("one buffer for two", "products.h", "first += ROUND, side ^= 1", "first += ROUND, side ^= 0"),
    ("a copy not waited for", "products.h", "wait_copies<1>()", "wait_copies<2>()"),
    ("a stretch not waited for", "floats.h", "wait_copies<STAGES - 2>()", "wait_copies<STAGES - 1>()"),
    ("a stretch overwritten while it is read", "floats.h",
     "        __syncthreads();                    /* all have", "        /* all have"),
    ("the second matrix in the first one's place", "products.h", "        s.out = a.beside.out;\n", ""),
    ("a wrong shuffle mask", "ptx.h", "half = 0xffffu << (threadIdx.x & 16)", "half = 0xffffu"),
    ("a fold in another order", "lanes_cuda.h",
     "    for (int half = 8; half; half /= 2)\n        a += f_other",
     "    for (int half = 1; half < 16; half *= 2)\n        a += f_other"),
    ("a descending sum", "products.h",
     "            for (int i = 0; i < n; i++)\n                y = fmaf(room.term[side][i]",
     "            for (int i = n - 1; i >= 0; i--)\n                y = fmaf(room.term[side][i]"),
    ("chunks in descending order", "attend.h",
     "            for (int i = 0; i < AHEAD; i++)\n                if (seen[i])\n                    o =",
     "            for (int i = AHEAD - 1; i >= 0; i--)\n"
     "                if (seen[i])\n                    o ="),
    ("a contracted product", "attend.h", "*x = u * cos - v * sin", "*x = fmaf(u, cos, -(v * sin))"),
    ("a contracted sum of weights", "attend.h",
     "*l = *l * j.keep + l_chunk * j.gain", "*l = fmaf(*l, j.keep, l_chunk * j.gain)"),
    ("swapped halves of an operand", "products.h",
     "o.codes[2] = low_codes(at.codes, q + 4), o.codes[3] = high_codes",
     "o.codes[3] = low_codes(at.codes, q + 4), o.codes[2] = high_codes"),
    ("a barrier left out of a tree of sums", "altup.h",
     "        __syncthreads();\n        if (t < half)", "        if (t < half)"),
    ("a contracted sum of coefficients", "altup.h",
     "c = c + a.coef[t * a.n + i] * s.router[i]", "c = fmaf(a.coef[t * a.n + i], s.router[i], c)"),
    ("a version changed before it was read", "altup.h", "change = fmaf(s.c[i * a.n + j], old[j], change)",
     "change = fmaf(s.c[i * a.n + j], j ? rows[(size_t)j * dim] : old[j], change)"),
    ("a column too many", "products.h", "|| col >= s.n)", "|| col > s.n)"),
    ("a row too many", "products.h", "if (row >= a.n_rows ||", "if (row > a.n_rows ||"),
]


def found(cxx: str, objects: list[str], folder: Path) -> bool:
    """Whether the test program, compiled from the folder, says that something is wrong."""
    program = folder / "test_kernels"
    flags = ["-std=c++17", "-O1", "-w", "-DFEW_TYPES", "-ffp-contract=off", "-pthread",
             f"-I{folder / 'native'}", f"-I{folder / 'tests/cuda'}"]
    source = str(folder / "tests/cuda/test_kernels.cpp")
    subprocess.run([cxx, *flags, source, *objects, "-lm", "-ldl", "-o", str(program)], check=True)
    return subprocess.run([program], capture_output=True, timeout=120).returncode != 0


def main() -> int:
    cxx, objects = sys.argv[1], [str(Path(o).resolve()) for o in sys.argv[2:]]
    missed = 0
    for what, name, old, new in [("nothing", "ptx.h", "", ""), *MUTANTS]:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            for part in ("native", "tests/cuda"):
                shutil.copytree(ROOT / part, folder / part)
            path = folder / "native/cuda" / name
            text = path.read_text()
            if text.count(old) < 1:
                raise SystemExit(f"{name}: expected to find {old!r}, found no such text")
            path.write_text(text.replace(old, new) if old else text)
            wrong = found(cxx, objects, folder) != (what != "nothing")
            missed += wrong
            print(f"{what}: {'NOT as expected' if wrong else 'found' if old else 'passes'}", flush=True)
    return missed > 0


if __name__ == "__main__":
    sys.exit(main())
