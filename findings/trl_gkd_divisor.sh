#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# trl 1.16.0, trl.experimental.gkd.GKDTrainer: the sum over tokens is divided by num_items_in_batch, and in two cases
# that is not the number of tokens that a step has averaged over.
# (1) On n ranks a step is 1/n of what one process makes of the same batch. num_items_in_batch counts the tokens of all
# ranks, DDP averages the gradients, and nothing multiplies by n, which Trainer and SFTTrainer do.
# (2) Where the student made the sequences (lmbda, 0.5 by default), labels are new and the count is still that of the
# data set's: the loss is off by tokens made / tokens of the data set, here 8, and on- and off-policy steps weigh
# differently. Adam does not see a constant factor; the logged loss, clipping and a factor that varies, as in (2), do.
# Where: trl/experimental/gkd/gkd_trainer.py, compute_loss (no accelerator.num_processes) and training_step (exchanges
# inputs["labels"] after transformers' get_batch_samples has counted).
# Belief: a step is the gradient of the mean over its tokens, whoever made them and on however many ranks.
# Seen with trl 1.16.0, transformers 5.24.0, torch 2.13.0, Python 3.11 on a CPU:
#   ranks 1: SFTTrainer step 1.0000, GKDTrainer step 1.0000, of that on one rank
#   ranks 2: SFTTrainer step 1.0000, GKDTrainer step 0.5000, of that on one rank
#   on-policy: 64 tokens in the sum, divided by 8
# Exit status 0: it still is so. 1: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --disable-pip-version-check install -q \
  "torch==2.13.0" "trl==1.16.0" "transformers==5.24.0" "accelerate==1.15.0"

cat > "$folder/steps.py" <<'PY'
import json
import os
import sys
import tempfile

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, default_data_collator
from trl import SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer


def model(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, use_cache=False, bos_token_id=None, eos_token_id=None, **sizes))


class Watched(GKDTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.seen = int((inputs["labels"][:, 1:] != -100).sum()), int(num_items_in_batch)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


torch.manual_seed(0)
# eight tokens, the last two of which are the answer
rows = [
    {
        "input_ids": ids,
        "attention_mask": [1] * 8,
        "labels": [-100] * 6 + ids[6:],
        "prompts": ids[:6],
        "prompt_attention_mask": [1] * 6,
    }
    for ids in torch.randint(1, 32, (4, 8)).tolist()
]
words = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({str(i): i for i in range(32)}, unk_token="0")), pad_token="0"
)
ranks = int(os.environ.get("WORLD_SIZE", 1))


def run(made, data, lmbda=0.0):
    student = model(1)
    before = [p.detach().clone() for p in student.parameters()]
    with tempfile.TemporaryDirectory() as folder:
        settings = GKDConfig(
            folder,
            lmbda=lmbda,
            max_new_tokens=16,
            max_steps=1,
            per_device_train_batch_size=4 // ranks,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        teacher = {} if made is SFTTrainer else {"teacher_model": model(2)}
        trainer = made(
            student,
            args=settings,
            data_collator=default_data_collator,
            train_dataset=Dataset.from_list(data),
            processing_class=words,
            **teacher,
        )
        trainer.train()
    moved = sum((p.detach() - q).square().sum() for p, q in zip(student.parameters(), before, strict=True))
    return float(moved.sqrt()), getattr(trainer, "seen", None)


plain = [{name: row[name] for name in ("input_ids", "attention_mask", "labels")} for row in rows]
found = {made.__name__: run(made, plain)[0] for made in (SFTTrainer, GKDTrainer)}
if ranks == 1:
    found["on-policy"] = run(Watched, rows, lmbda=1.0)[1]
if int(os.environ.get("RANK", 0)) == 0:
    with open(sys.argv[1], "w") as file:
        json.dump(found, file)
PY

export OMP_NUM_THREADS=1
"$folder/venv/bin/python" "$folder/steps.py" "$folder/1" >"$folder/log" 2>&1 || { cat "$folder/log" >&2; exit 2; }
"$folder/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node 2 "$folder/steps.py" "$folder/2" \
  >"$folder/log" 2>&1 || { cat "$folder/log" >&2; exit 2; }
"$folder/venv/bin/python" - "$folder/1" "$folder/2" <<'PY'
import json
import sys

one, two = (json.load(open(file)) for file in sys.argv[1:])
for ranks, found in ((1, one), (2, two)):
    shares = ", ".join(f"{name} step {found[name] / one[name]:.4f}" for name in ("SFTTrainer", "GKDTrainer"))
    print(f"ranks {ranks}: {shares}, of that on one rank")
print("on-policy: {} tokens in the sum, divided by {}".format(*one["on-policy"]))
half = abs(two["GKDTrainer"] / one["GKDTrainer"] - 0.5) < 1e-3
whole = abs(two["SFTTrainer"] / one["SFTTrainer"] - 1) < 1e-3
sys.exit(not (half and whole and one["on-policy"] == [64, 8]))
PY
