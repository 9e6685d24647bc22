# Two commands: `make demo` sets everything up and runs the main job, `make test` sets everything up and passes the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
CPU := src/numfit/kernels/cpu
NATIVE := CMakeLists.txt $(wildcard $(CPU)/*)

.PHONY: demo test check bench native-check sanitize neon clean

demo: $(VENV)/.demo
	$(BIN)/numfit demo

test: $(VENV)/.test
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

check: $(VENV)/.test
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy src/numfit
	$(BIN)/lint-imports

bench: $(VENV)/.test
	$(INSTALL) '.[bench]'
	$(BIN)/python benchmarks/fit.py

# The CPU kernels without Python: every instruction set of this machine against the portable one, bit for bit. Before that: what
# was compiled for one processor must not carry a name that the linker could take for all of them.
native-check: $(VENV)/build/driver
	@! nm -C --defined-only $$(find $(VENV)/build -name '*isa.cpp.o') | grep ' [uW] ' | \
	grep -vE 'nf::(portable|avx2|avxvnni|avx512|amx|neon)::'
	$<

# The same and the kernel tests, on a build that stops at the first bad access or undefined behaviour. (Python leaks.)
SANITIZE := -Og -g -w -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
sanitize: $(VENV)/.test $(VENV)/sanitize/driver
	UBSAN_OPTIONS=print_stacktrace=1 $(VENV)/sanitize/driver
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=print_stacktrace=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/test_kernels*.py \
	--native-library $(VENV)/sanitize/libnumfit_cpu.so

# The same driver on ARM: cross-compiled, run by an emulator.
CROSS := aarch64-linux-gnu-g++
QEMU := qemu-aarch64-static
neon:
	@command -v $(CROSS) >/dev/null && command -v $(QEMU) >/dev/null || { echo "make neon needs $(CROSS) and $(QEMU):" \
	"install the Debian packages g++-aarch64-linux-gnu and qemu-user-static" >&2; exit 1; }
	@$(MAKE) $(VENV)/neon/driver
	$(QEMU) -L /usr/aarch64-linux-gnu $(VENV)/neon/driver

COMPILE = $(CXX) -std=c++17 -O1 -Wall -Wextra $(FLAGS) -I$(CPU) $< -o $@ -L$(@D) -lnumfit_cpu -Wl,-rpath,'$$ORIGIN'
$(VENV)/sanitize/driver: BUILD := -DCMAKE_CXX_COMPILER=$(CXX) -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS='$(SANITIZE)'
$(VENV)/sanitize/driver: FLAGS := $(SANITIZE)
$(VENV)/neon/driver: BUILD := -DCMAKE_CXX_COMPILER=$(CROSS) -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64
$(VENV)/neon/driver: CXX := $(CROSS)

$(VENV)/%/driver: tests/native/driver.cpp $(NATIVE) | $(VENV)/.torch
	$(BIN)/cmake -S . -B $(@D) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja $(BUILD) >/dev/null
	$(BIN)/cmake --build $(@D)
	$(COMPILE)

$(VENV)/build/driver: tests/native/driver.cpp $(VENV)/.test
	$(COMPILE)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and alone: with it installed at its pinned version, nothing later replaces it by a larger build
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) torch==2.13.0
	$(PIP) scikit-build-core cmake ninja
	touch $@

# Built with these tools and in a directory that stays, so that installing again compiles only what changed.
INSTALL := $(PIP) --no-build-isolation --config-settings=build-dir=$(VENV)/build -e
$(VENV)/.demo: pyproject.toml $(NATIVE) $(VENV)/.torch
	$(INSTALL) '.[demo]'
	touch $@

$(VENV)/.test: pyproject.toml $(NATIVE) $(VENV)/.torch
	$(INSTALL) '.[test]'
	touch $@

clean:
	rm -rf $(VENV)
