# make         the library, pybmc/libpybmc.so; needs a C compiler and nothing else
# make demo    a story from the bundled models     make test    all tests: test-native and test-python
# make CUDA=1  also pybmc/kernels.fatbin, the GPU's kernels, with NVCC or with nvcc from PyPI in build/nvcc
# make test-native     test-release, asan, tsan, test-cuda, test-x86 and test-arm
# make test-release    the native tests, and those that read PYBMC_CPU again with each of its values here
# make asan, tsan      the native tests under AddressSanitizer and UBSan, those of threads under ThreadSanitizer
# make test-cuda       the GPU's kernels on the CPU, against the library's bits; make asan has it too, for fewer types
# make cuda-check      what nvcc makes of them: registers, shared memory, roundings; FEW=1: of a few types, for one chip
# make cuda-mutants    the tests of these kernels find mistakes that are made on purpose
# make test-ptx        the compiled kernels, as PTX, on the CPU: a minute; make ptx-mutants: mistakes in them are found
# make test-x86        the native tests on an emulated x86-64 CPU without AVX-512, where there is qemu-x86_64
# make test-arm        the native tests as arm64 programs on qemu-aarch64, and their bits against this machine's
# make test-python     ruff, mypy, the Python tests, and those of numbers again with each lower PYBMC_CPU
# make venv    .venv with pybmc (editable) and what its tests need
# make install pip install into PYTHON            make clean   remove what was built
#
# Variables: CC, CFLAGS and LDFLAGS (added to ours), PYTHON (3.10 or later), ARM_CC, ARM_EMULATOR, X86_EMULATOR, CXX, NVCC;
# V=1 shows each command of the compiler.

MAKEFLAGS += --no-print-directory
.DELETE_ON_ERROR:
.SECONDARY:
.PHONY: all demo test test-native test-python test-release asan tsan test-x86 test-arm native-tests
.PHONY: levels fake-driver test-cuda test-ptx cuda-check cuda-mutants ptx-mutants venv install clean FORCE
all:

ifeq ($(MAKELEVEL),0)      # a -j of the command line comes before this one
MAKEFLAGS += -j$(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
endif

VARIANT ?= release
PYTHON ?= python3
VENV := .venv
OUT := build/$(VARIANT)
ARM_CC ?= aarch64-linux-gnu-gcc
ARM_EMULATOR ?= $(shell command -v qemu-aarch64 || command -v qemu-aarch64-static || echo qemu-aarch64)
X86_EMULATOR ?= $(shell command -v qemu-x86_64 || command -v qemu-x86_64-static || echo qemu-x86_64)
LIBRARY := pybmc/libpybmc.$(if $(filter Darwin,$(shell uname -s)),dylib,so)

FLAGS_release = -O3
FLAGS_arm = -O3 -static
FLAGS_asan = -O1 -g -DCOLS_MAX=4 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
FLAGS_tsan = -O1 -g -fsanitize=thread
FLAGS = $(FLAGS_$(VARIANT)) -std=c11 -D_GNU_SOURCE -fPIC -pthread -fvisibility=hidden -ffp-contract=off \
        -Wall -Wextra -Wshadow -Inative

# A kernel file is named after the instructions it may use: <family>_<isa>.c.
FLAGS_avx2 = -mavx2 -mfma -mf16c -mbmi2
FLAGS_avx512 = $(FLAGS_avx2) -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mprefer-vector-width=512
FLAGS_neon = -march=armv8.2-a+dotprod
FLAGS_i8mm = $(FLAGS_neon)+i8mm
ISAS_x86_64 = avx2 avx512
ISAS_aarch64 = neon i8mm
ISAS_arm64 = neon i8mm
ISAS := $(ISAS_$(firstword $(subst -, ,$(shell $(CC) -dumpmachine 2>/dev/null))))

FOREIGN := $(filter-out $(ISAS),avx2 avx512 neon i8mm)
SOURCES := $(filter-out $(FOREIGN:%=\%_%.c),$(wildcard native/*.c native/*/*.c))
TESTS := $(wildcard tests/native/*.c)
OBJECTS := $(SOURCES:%.c=$(OUT)/%.o)
COMPILE = $(CC) $(FLAGS) $(CFLAGS)
# $(call short,CC)command: the command is shown as `CC target`, with V=1 as it is.
short = $(if $(V),,@echo "$(1) $@"; )

KERNELS := pybmc/kernels.fatbin

all: $(LIBRARY) $(if $(filter 1,$(CUDA)),$(KERNELS))

$(LIBRARY): build/release/library
	@cp $< $@.new && mv $@.new $@           # a running process keeps the file it has open

$(OUT)/library: $(OBJECTS) $(OUT)/OBJECTS.txt
	$(call short,LD)$(COMPILE) -shared $(LDFLAGS) $(OBJECTS) -lm -ldl -o $@

$(OUT)/%.o: %.c $(OUT)/COMPILE.txt
	@mkdir -p $(@D)
	$(call short,CC)$(COMPILE) $(foreach isa,$(ISAS),$(if $(filter %_$(isa),$*),$(FLAGS_$(isa)))) -MMD -MP -c $< -o $@

$(OUT)/tests/native/%: $(OUT)/tests/native/%.o $(OBJECTS)
	$(call short,LD)$(COMPILE) $(LDFLAGS) $^ -lm -ldl -o $@

# Files that remember a variable: what depends on one is made again when the variable changes.
$(OUT)/COMPILE.txt $(OUT)/OBJECTS.txt: $(OUT)/%.txt: FORCE
	@mkdir -p $(@D)
	@echo '$($*)' | cmp -s - $@ || { $(check_$*) echo '$($*)' > $@; }

# One sentence where there is no compiler, or no headers of the C library.
check_COMPILE = $(CC) -include stdint.h -x c -fsyntax-only /dev/null >$(@D)/compiler.txt 2>&1 || { \
    echo "make: a C compiler is needed, gcc or clang, with the headers of the C library (Debian, Ubuntu: apt install gcc libc6-dev;" \
           "Fedora: dnf install gcc; macOS: xcode-select --install). CC is '$(CC)', and says: $$(head -1 $(@D)/compiler.txt)"; exit 1; };

-include $(OBJECTS:.o=.d) $(TESTS:%.c=$(OUT)/%.d) $(patsubst %.c,$(OUT)/%.d,$(wildcard tests/cuda/*.c))

# ---- the GPU's kernels ----

CUDA_SOURCES := $(wildcard native/cuda/*.h native/cuda/*.cu native/kernels/*.h) $(addprefix native/,exp.h route.h sums.h kernels.h panels.h state.h types.h bmc.h)
NVCC ?= $(or $(shell command -v nvcc),$(WHEEL_NVCC))
WHEEL_NVCC := build/nvcc/bin/nvcc
# -fmad=false: a product and a sum are only one operation where fmaf says so.
NVCC_FLAGS = -std=c++17 -fmad=false -Inative
CUDA_TARGETS = -gencode arch=compute_75,code=compute_75 -gencode 'arch=compute_80,code=[sm_80,compute_80]' -gencode arch=compute_90,code=sm_90

$(KERNELS): $(CUDA_SOURCES) $(filter $(WHEEL_NVCC),$(NVCC))
	$(NVCC) $(NVCC_FLAGS) $(CUDA_TARGETS) --threads 0 -compress-mode=size -fatbin native/cuda/kernels.cu -o $@

# All four of one version: nvcc alone draws a newer nvvm, whose PTX its ptxas refuses.
$(WHEEL_NVCC):
	$(PYTHON) -m venv build/nvcc/venv
	build/nvcc/venv/bin/pip install --quiet --disable-pip-version-check \
	    $(foreach part,cuda-nvcc nvvm cuda-crt cuda-runtime,'nvidia-$(part)==13.0.*')
	@mkdir -p $(@D)
	printf '#!/bin/sh\nexec "%s" "$$@"\n' "$$(echo $(CURDIR)/build/nvcc/venv/lib/python3*/site-packages/nvidia/cu13/bin/nvcc)" >$@
	@chmod +x $@

# FEW=1: of a few types and for one chip, quick enough for every change.
ifeq ($(FEW),1)
cuda-check: NVCC_FLAGS += -include tests/cuda/few_types.h
cuda-check: CUDA_TARGETS = -gencode arch=compute_90,code=sm_90
endif

# No value leaves the registers, shared memory fits, and every operation is rounded as IEEE says. driver.h says what cuda.h does.
cuda-check: $(CUDA_SOURCES) $(filter $(WHEEL_NVCC),$(NVCC))
	@mkdir -p build/cuda-check
	$(NVCC) -std=c++17 -x c++ -c tests/cuda/abi.cpp -o build/cuda-check/abi.o
	$(NVCC) $(NVCC_FLAGS) $(CUDA_TARGETS) -Xptxas -v --threads 0 -fatbin native/cuda/kernels.cu -o build/cuda-check/kernels.fatbin 2>build/cuda-check/log.txt \
	    || { cat build/cuda-check/log.txt; exit 1; }
	$(NVCC) $(NVCC_FLAGS) -arch=compute_80 -ptx native/cuda/kernels.cu -o build/cuda-check/kernels.ptx
	@grep 'spill stores' build/cuda-check/log.txt | grep -v ' 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads' && exit 1 || \
	! grep -E '\.approx|\.ftz' build/cuda-check/kernels.ptx || exit 1; \
	echo "make cuda-check: $$(grep -c 'spill stores' build/cuda-check/log.txt) kernels, without spills, approximations and flushed subnormals"

# ---- tests ----

# What runs PTX on the CPU. Integers wrap around there.
PTX_OBJECTS := $(patsubst %.cpp,$(OUT)/%.o,$(wildcard tests/cuda/ptx*.cpp))
$(PTX_OBJECTS): $(OUT)/%.o: %.cpp tests/cuda/ptx.h
	@mkdir -p $(@D)
	$(CXX) $(CXX_FLAGS) -O2 -march=native -fwrapv -fPIC $(CXXFLAGS) -c $< -o $@

# A CUDA driver that runs the kernels on the CPU: tests/cuda/driver.cpp.
fake-driver: $(OUT)/tests/cuda/driver.so
$(OUT)/tests/cuda/driver.so: tests/cuda/driver.cpp tests/cuda/cublas.cpp $(PTX_OBJECTS) $(wildcard tests/cuda/*.h native/cuda/* native/*.h native/kernels/*.h)
	@mkdir -p $(@D)
	$(call short,CXX)$(CXX) -std=c++17 -O1 -march=native -ffp-contract=off -fPIC -shared -pthread -Inative $(CXXFLAGS) $< $(PTX_OBJECTS) -o $@.new && mv $@.new $@

PROGRAMS := $(TESTS:%.c=$(OUT)/%)
RUNS := $(TESTS:tests/native/%.c=run-%)
LEVEL_TESTS := test_cpu test_sample     # those that PYBMC_CPU concerns; other native tests name levels themselves
NUMBER_TESTS := $(addprefix tests/test_,invariance.py golden.py types.py arena.py engine.py prove.py)
SYNC := $(if $(filter output-sync,$(.FEATURES)),-Otarget)
PYTEST = $(VENV)/bin/python -m pytest -q -rs -n auto --maxprocesses 4 --dist worksteal

# Both halves run to their end, and every test of a half, whatever fails.
test:
	@$(MAKE) -k $(SYNC) test-native && native=passed || native=failed; \
	$(MAKE) -k test-python && python=passed || python=failed; \
	echo "test-native: $$native"; echo "test-python: $$python"; \
	test $$native = passed && test $$python = passed

test-native: test-release asan tsan test-cuda test-x86 test-arm

test-release: native-tests levels

native-tests: $(RUNS)

.PHONY: $(RUNS)
$(RUNS): run-%: $(OUT)/tests/native/%
	$(EMULATOR) $< $(TEST_ARGS)

# test_cpu prints the levels of this CPU.
levels: $(LEVEL_TESTS:%=$(OUT)/tests/native/%)
	@failed=0; for level in $$($<); do for test in $^; do \
	    echo "PYBMC_CPU=$$level $$test"; PYBMC_CPU=$$level $$test || failed=1; \
	done; done; exit $$failed

asan:
	$(MAKE) VARIANT=asan native-tests
	$(MAKE) VARIANT=asan test-cuda

# Kernels of CUDA as a C++ program: tests/cuda/grid.h runs their threads one by one.
CUDA_TEST := $(OUT)/tests/cuda/test_kernels
PTX_TEST := $(OUT)/tests/cuda/test_ptx
CUDA_REFERENCES := $(patsubst %.c,$(OUT)/%.o,$(wildcard tests/cuda/*.c))
CXX_FLAGS_asan = -DFEW_TYPES
CXX_FLAGS = $(patsubst -O%,-O1,$(FLAGS_$(VARIANT))) $(CXX_FLAGS_$(VARIANT)) -std=c++17 -U_FORTIFY_SOURCE -ffp-contract=off -pthread -Wall -Wextra -Wno-missing-field-initializers -Inative

test-cuda:
	@$(call needs,$(CXX)) test "$$(uname)" = Linux || { echo "make $@: skipped, only on Linux"; exit 0; }; \
	$(MAKE) VARIANT=$(VARIANT) $(CUDA_TEST) $(PTX_TEST) && $(PTX_TEST) && $(CUDA_TEST)

$(CUDA_TEST) $(PTX_TEST): %: %.o $(CUDA_REFERENCES) $(PTX_OBJECTS) $(OBJECTS)
	$(call short,LD)$(CXX) $(CXX_FLAGS) $(LDFLAGS) $^ -lm -ldl -o $@

$(CUDA_TEST).o $(PTX_TEST).o: $(OUT)/%.o: %.cpp $(CUDA_SOURCES) $(wildcard tests/cuda/*.h)
	@mkdir -p $(@D)
	$(call short,CXX)$(CXX) $(CXX_FLAGS) -c $< -o $@

cuda-mutants: $(CUDA_REFERENCES) $(PTX_OBJECTS) $(OBJECTS)
	$(PYTHON) tests/cuda/mutants.py $(CXX) $^

# The compiled kernels: without 8-bit matrices, and with them.
PTX := $(patsubst %,$(OUT)/tests/cuda/kernels_%.ptx,75 80)
$(PTX): $(OUT)/tests/cuda/kernels_%.ptx: $(CUDA_SOURCES) $(filter $(WHEEL_NVCC),$(NVCC))
	@mkdir -p $(@D)
	$(NVCC) $(NVCC_FLAGS) -arch=compute_$* -ptx native/cuda/kernels.cu -o $@

test-ptx: $(PTX) $(CUDA_TEST) $(PTX_TEST) $(LIBRARY) venv
	$(PTX_TEST)
	@for file in $(PTX); do echo "$$file"; $(CUDA_TEST) $$file || exit 1; done
	PYBMC_PTX="$(abspath $(PTX))" $(VENV)/bin/python -m pytest -q -rs tests/test_gpu_ptx.py

ptx-mutants: $(PTX) $(CUDA_TEST)
	$(PYTHON) tests/cuda/ptx_mutants.py $(CUDA_TEST) $(lastword $(PTX))

tsan:
	$(MAKE) VARIANT=tsan SOURCES="$(addprefix native/,threads.c fork.c cores.c error.c)" TESTS=tests/native/test_threads.c \
	    TEST_ARGS=no-fork native-tests

# An emulated CPU with every feature that the emulator has, except AVX-512.
test-x86: EMULATOR := $(X86_EMULATOR) -cpu max,-avx512f
test-x86: $(PROGRAMS)
	@$(call needs,$(X86_EMULATOR)) \
	case "$(ISAS)" in *avx2*) ;; *) echo "make test-x86: skipped, this machine is no x86-64"; exit 0;; esac; \
	export PYBMC_CPU=; levels=$$($(EMULATOR) $(OUT)/tests/native/test_cpu) || exit 1; \
	case "$$levels" in *avx512*) echo "make test-x86: the emulated CPU has AVX-512"; exit 1;; esac; \
	echo "make test-x86: $(EMULATOR), with" $$levels; \
	$(MAKE) EMULATOR="$(EMULATOR)" TEST_ARGS=no-fork native-tests

test-arm: $(OUT)/tests/native/test_bits
	@$(call needs,$(ARM_CC)) $(call needs,$(ARM_EMULATOR)) \
	export PYBMC_CPU=; failed=0; \
	$(MAKE) VARIANT=arm CC=$(ARM_CC) EMULATOR=$(ARM_EMULATOR) TEST_ARGS=no-fork native-tests || failed=1; \
	$< >$(OUT)/bits.txt; \
	$(ARM_EMULATOR) build/arm/tests/native/test_bits | diff $(OUT)/bits.txt - || failed=1; \
	exit $$failed

# $(call needs,tool): end a recipe as skipped where there is no such tool.
needs = command -v $(1) >/dev/null || { echo "make $@: skipped, there is no $(1) here"; exit 0; };

# The reference kernels are slow: their run leaves out the tests marked "long".
test-python: $(LIBRARY) venv
	@failed=0; $(VENV)/bin/ruff check pybmc tools tests examples setup.py || failed=1; \
	$(VENV)/bin/mypy || failed=1; \
	$(PYTEST) tests || failed=1; \
	for level in $$($(VENV)/bin/python -c 'import pybmc._native as n; print(*n.cpu_levels()[:-1])'); do \
	    echo "PYBMC_CPU=$$level"; \
	    PYBMC_CPU=$$level $(PYTEST) -m "$$(test $$level != ref || echo not long)" $(NUMBER_TESTS) || failed=1; \
	done; exit $$failed

demo: $(VENV)/bin/pip $(LIBRARY) $(VENV)/.installed
	$(VENV)/bin/pybmc generate -p "Tell me of a king and a golden bird." -n 320
	@echo; echo "Talk with it: $(VENV)/bin/pybmc chat"

venv: $(VENV)/.tests

$(VENV)/.tests: $(VENV)/.installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

$(VENV)/.installed: pyproject.toml setup.py | $(VENV)/bin/pip $(LIBRARY)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e '.[chat,hub,serve,schema]'
	@touch $@

# pip is the last file of an environment, so that one that was cut off is made again.
$(VENV)/bin/pip:
	@command -v $(firstword $(PYTHON)) >/dev/null || { echo "make: Python 3.10 or later is needed, with venv (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "make: Python 3.10 or later is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1). Try make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	    { echo "make: $(PYTHON) has no venv (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

install:
	$(PYTHON) -m pip install .

clean:
	rm -rf build dist *.egg-info $(LIBRARY) $(KERNELS)
