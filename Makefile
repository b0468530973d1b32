PYTHON ?= python3
VENV   ?= .venv
BIN    ?= $(VENV)/bin
RUN    ?= results/demo
KILLS  ?= 50

# Threads that spin while they wait for each other stall for seconds on a machine with other work.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo app test test-all test-gpu test-app docs-check chaos lint format bench

# Train on the digits of scikit-learn, then sample: the scripts as one would call them by hand.
demo: $(VENV)/.installed
	$(BIN)/torchrun --nnodes=1 --nproc_per_node=1 train.py --model PPF-T-2 --data-path digits --run-dir $(RUN) \
	    --max-steps 1400 --global-batch-size 128 --lr 1e-3 --warmup-steps 50 --ema-decay 0.995 --num-workers 0 \
	    --log-every 100 --sample-every 400 --ckpt-every 400 --cfg-scales 1.5 $(FLAGS)
	$(BIN)/python sample.py ODE --ckpt $(RUN) --cfg-scales 1.5 --samples-per-class 10 --compare-finest \
	    --out $(RUN)/samples.png

# A page that draws with the demo's network, or with CKPT=...
app: $(VENV)/.installed
	$(BIN)/python app.py $(if $(CKPT),--ckpt $(CKPT)) $(FLAGS)

# A process for each core, up to 8; all tests of a file run in the same one, which shares their fixtures.
PARALLEL ?= --numprocesses auto --maxprocesses 8 --dist loadfile

test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-all: $(VENV)/.installed
	$(BIN)/python -m pytest $(PARALLEL)

test-gpu: $(VENV)/.installed
	$(BIN)/python -m pytest -m gpu

# The page, also in a browser: what is missing is installed where that can be, else its tests are skipped and say why.
test-app: $(VENV)/.installed
	-$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements-app.txt
	-command -v chromium chromium-browser google-chrome || \
	    { test "$$(id -u)" = 0 && apt-get update && apt-get install --yes chromium; }
	$(BIN)/python -m pytest tests/test_app.py tests/test_app_browser.py

# Every command of README.md and docs/ is parsed, and those marked runnable are run at toy size.
docs-check: $(VENV)/.installed
	$(BIN)/python -m pytest tests/test_docs.py

# Runs that are killed at random must end bit by bit as if they were not; on a GPU with CHAOS_DEVICES=0.
chaos: $(VENV)/.installed
	CHAOS_KILLS=$(KILLS) CHAOS_CORRUPTIONS=500 CHAOS_DEVICES=$(CHAOS_DEVICES) \
	    $(BIN)/python -m pytest tests/test_chaos.py tests/test_checkpoints.py

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.sampling
	$(BIN)/python -m benchmarks.solvers

# Installed once, and again when requirements.txt changes.
$(VENV)/.installed: requirements.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@
