"""A step of TRL's DPOTrainer, for step.py and gpu.py. It needs TRL and datasets."""

import time

import datasets
import tokenizers
import torch
import transformers
import trl

from benchmarks.step import Setting


class TrlStep:
    """One optimizer step of TRL's DPOTrainer on the same pairs. `modes`: more options of DPOConfig, see TRL_MODES."""

    def __init__(self, setting: Setting, model: torch.nn.Module, reference: torch.nn.Module, dtype: torch.dtype, **modes):
        special = ["<end>", "<pad>", "<unk>"]
        vocabulary = {name: i for i, name in enumerate([*special, *(f"t{i}" for i in range(3, model.config.vocab_size))])}
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<pad>", unk_token="<unk>")

        def text(tokens: list[int]) -> str:
            return "".join(f" t{i}" for i in tokens)

        rows = [
            {"prompt": text(prompt), "chosen": text(chosen[:-1]), "rejected": text(rejected[:-1])}  # TRL adds end-of-sequence
            for prompt, (chosen, rejected) in setting.pairs
        ]
        arguments = trl.DPOConfig(
            output_dir="/tmp/trl-benchmark",
            per_device_train_batch_size=setting.microbatch,
            gradient_accumulation_steps=len(rows) // setting.microbatch,
            max_length=None,
            beta=0.1,
            optim="rmsprop",
            learning_rate=0.0,
            max_grad_norm=10.0,
            bf16=dtype == torch.bfloat16,
            use_cpu=setting.device.type == "cpu",
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            max_steps=1,
            **modes,
        )
        self.trainer = trl.DPOTrainer(
            model, reference, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
        )
        self.started = 0.0
        self.trainer.add_callback(_StepClock(self))

    def __call__(self) -> float:
        return self.trainer.train().training_loss


class _StepClock(transformers.TrainerCallback):
    """A callback that measures the time of a step without TRL's preparations."""

    def __init__(self, step: TrlStep):
        self.step = step

    def on_step_begin(self, *_, **__):
        self.step.started = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.step.seconds = time.perf_counter() - self.step.started
