PYTHON ?= python3
VENV   ?= .venv
RUN    ?= results/demo
BIN    := $(VENV)/bin

.PHONY: demo test lint format bench

# One install, redone only when requirements.txt changes.
$(VENV)/.installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements.txt
	touch $@

demo: $(VENV)/.installed
	$(BIN)/torchrun --nnodes=1 --nproc_per_node=1 train.py --model PPF-T-2 --data-path digits --run-dir $(RUN) \
	    --max-steps 1500 --global-batch-size 128 --lr 1e-3 --warmup-steps 50 --ema-decay 0.995 --cfg-scales 1.5 \
	    --num-workers 0 --log-every 50 --sample-every 500 --ckpt-every 500
	$(BIN)/python sample.py ODE --ckpt $(RUN) --cfg-scales 1.5 --samples-per-class 10 --out $(RUN)/samples.png --compare-finest

test: $(VENV)/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.levels
