# make         the library, pybmc/libpybmc.so; needs a C compiler and nothing else
# make demo    a tale from the bundled models     make test    all tests
# make asan    the native tests under AddressSanitizer and UBSan
# make test-arm    the native tests as arm64 programs, and their bits against this machine's
# make venv    .venv with pybmc (editable) and what its tests need
# make install pip install into PYTHON            make clean   remove what was built
#
# Variables: CC, CFLAGS and LDFLAGS (added to ours), PYTHON (3.10 or later), ARM_CC and ARM_EMULATOR.

.DELETE_ON_ERROR:
.SECONDARY:
.PHONY: all demo test asan test-arm same-bits native-tests venv install clean FORCE
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
LIBRARY := pybmc/libpybmc.$(if $(filter Darwin,$(shell uname -s)),dylib,so)

FLAGS_release = -O3
FLAGS_arm = -O3 -static
FLAGS_asan = -O1 -g -DCOLS_MAX=4 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
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
ISAS := $(ISAS_$(firstword $(subst -, ,$(shell $(CC) -dumpmachine))))

FOREIGN := $(filter-out $(ISAS),avx2 avx512 neon i8mm)
SOURCES := $(filter-out $(FOREIGN:%=\%_%.c),$(wildcard native/*.c native/*/*.c))
TESTS := $(wildcard tests/native/*.c)
OBJECTS := $(SOURCES:%.c=$(OUT)/%.o)
COMPILE = $(CC) $(FLAGS) $(CFLAGS)

all: $(LIBRARY)

$(LIBRARY): build/release/library
	@cp $< $@.new && mv $@.new $@           # a running process keeps the file it has open

$(OUT)/library: $(OBJECTS) $(OUT)/OBJECTS.txt
	$(COMPILE) -shared $(LDFLAGS) $(OBJECTS) -lm -o $@

$(OUT)/%.o: %.c $(OUT)/COMPILE.txt
	@mkdir -p $(@D)
	$(COMPILE) $(foreach isa,$(ISAS),$(if $(filter %_$(isa),$*),$(FLAGS_$(isa)))) -MMD -MP -c $< -o $@

$(OUT)/tests/native/%: $(OUT)/tests/native/%.o $(OBJECTS)
	$(COMPILE) $(LDFLAGS) $^ -lm -o $@

# Files that remember a variable: what depends on one is made again when the variable changes.
$(OUT)/COMPILE.txt $(OUT)/OBJECTS.txt: $(OUT)/%.txt: FORCE
	@mkdir -p $(@D)
	@echo '$($*)' | cmp -s - $@ || echo '$($*)' > $@

-include $(OBJECTS:.o=.d) $(TESTS:%.c=$(OUT)/%.d)

asan:
	$(MAKE) VARIANT=asan native-tests

native-tests: $(TESTS:%.c=$(OUT)/%)
	@for test in $^; do echo $$test; $(EMULATOR) $$test || exit 1; done

test-arm: $(LIBRARY)
	@for tool in $(ARM_CC) $(ARM_EMULATOR); do \
	    command -v $$tool >/dev/null || { echo "make test-arm: skipped, there is no $$tool here"; exit 0; }; \
	done; \
	$(MAKE) VARIANT=arm CC=$(ARM_CC) EMULATOR=$(ARM_EMULATOR) native-tests && $(MAKE) same-bits

same-bits: $(OUT)/tests/native/test_bits
	$< >$(OUT)/bits.txt
	$(ARM_EMULATOR) build/arm/tests/native/test_bits | diff $(OUT)/bits.txt -

test: $(LIBRARY) venv asan test-arm
	$(VENV)/bin/python -m pytest -q tests

demo: $(LIBRARY) venv
	$(VENV)/bin/pybmc generate -p "Tell me of a king and a golden bird." -n 320

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py | $(LIBRARY)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "pybmc needs Python 3.10 or later; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -e '.[chat,test]'
	@touch $@

install:
	$(PYTHON) -m pip install .

clean:
	rm -rf build dist *.egg-info $(LIBRARY)
