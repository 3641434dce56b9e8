"""Mistakes in compiled kernels that test_kernels has to find, with the words that it says then.

make ptx-mutants: python ptx_mutants.py TEST_KERNELS FILE. Each is made in the text of one kernel of the PTX.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

BITS, RACE = "other bits", "this shared memory"
BARRIER_IN_A_BRANCH = ("{ .reg .pred %q; .reg .b32 %u; mov.u32 %u, %tid.x; setp.lt.u32 %q, %u, 16; "
                       "@%q bar.sync 0; }")
MATRICES = r"(mma\.sync\S*k32\S*\s\{[^}]*\}, \{)(%r\d+),(%r\d+)"

# what is wrong, kernel, pattern, what its first match becomes, what the test says
MUTANTS = [
    ("a barrier left out", "narrow2_q4_0", r"bar\.sync\s+0;", ";", RACE),
    ("a barrier left out", "norm_tokens", r"bar\.sync\s+0;", ";", RACE),
    ("a barrier of a warp left out", "route", r"bar\.warp\.sync\s+65535;", ";", RACE),
    ("a barrier in a branch", "norm_rows", r"bar\.sync\s+0;", BARRIER_IN_A_BRANCH, "barrier"),
    ("a copy not waited for", "tiles_q4_0",
     r"cp\.async\.wait_group 1;", "cp.async.wait_group 2;", "a copy not awaited"),
    ("rows of a matrix in each other's place", "wide8_q4_0", MATRICES, r"\1\3,\2", BITS),
    ("a matrix's registers from another block", "tiles_q4_0",
     r"(mma\.sync\S*k32\S*\s\{[^}]*\}, \{[^}]*\}, \{)(%r\d+),(%r\d+)", r"\1\3,\2", BITS),
    ("a pair that begins between two", "recur_walk",
     r"(ld\.global\.v2\.u32[^;]*\+)24\]", r"\g<1>28]", "is not a multiple of 8"),
    ("an argument four bytes on", "quantize", r"_param_0\+16\]", "_param_0+20]", "is not a multiple of 8"),
    ("another argument", "combine", r"_param_0\+8\]", "_param_0]", BITS),
    ("less shared memory than there is", "best",
     r"(\.shared .*\[)\d+\]", r"\g<1>64]", "bytes of arguments and"),
    ("a shuffle from elsewhere", "quantize", r"shfl\.sync\.bfly", "shfl.sync.down", BITS),
    ("a sum that may be contracted", "norm_tokens", r"add\.rn\.f32", "add.f32", "does not know"),
    ("a rounding towards zero", "quantize", r"cvt\.rni\.f32\.f32", "cvt.rzi.f32.f32", BITS),
]
OTHER_TYPES = re.compile(r"\.visible \.entry (?:narrow\d|wide\d+|tiles)_(?!q4_0\(|q6_k\()"
                         r"[^\n]*\n.*?\n\}\n", re.DOTALL)


def change(text: str, kernel: str, pattern: str, new: str) -> str:
    begin = text.index(f".visible .entry {kernel}(")
    end = text.index("\n}\n", begin)
    body, n = re.subn(pattern, new, text[begin:end], count=1)
    if not n:
        raise SystemExit(f"{kernel}: expected to find {pattern!r}, found no such text")
    return text[:begin] + body + text[end:]


def main() -> int:
    program, text = sys.argv[1], OTHER_TYPES.sub("", Path(sys.argv[2]).read_text())
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.ptx"
        none = "nothing", "norm_tokens", "", "", " 0 with other bits"
        for what, kernel, pattern, new, words in [none, *MUTANTS]:
            path.write_text(change(text, kernel, pattern, new))
            run = subprocess.run([program, path], capture_output=True, text=True, timeout=300)
            right = words in run.stdout and (run.returncode != 0) == (what != "nothing")
            missed += not right
            told = "as expected" if right else "NOT as expected: " + run.stdout[:500]
            print(f"{kernel}: {what}: {told}", flush=True)
    return missed > 0


if __name__ == "__main__":
    sys.exit(main())
