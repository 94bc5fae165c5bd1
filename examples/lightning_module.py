# SPDX-License-Identifier: Apache-2.0
"""Distillation in a LightningModule: KD on the logits, CKA on a layer with a warm-up, a schedule that never recompiles.

`python examples/lightning_module.py` trains a teacher and a smaller student on scikit-learn's digits in seconds on a
CPU; it needs lightning and scikit-learn, and nothing is downloaded. `Distillation` is all that a real model needs.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings

try:
    import lightning
    import torch
    import torch.nn.functional as F
    from sklearn.datasets import load_digits
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] not in ("lightning", "sklearn", "torch"):
        raise  # one that these import in turn: the traceback says which
    sys.exit(f"{error}: pip install -e '.[demo,integrations]' installs what is needed")

import kdkernels as kd


class Net(nn.Module):
    """Logits and the features before them; what a real model gives through a hook or its own output."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(channels, 2 * channels, 3, padding=1),
            nn.BatchNorm2d(2 * channels),
            nn.ReLU(),
            nn.AvgPool2d(2),
        )
        self.head = nn.Linear(2 * channels * 4, 10)

    def forward(self, images):
        features = self.body(images)
        return self.head(features.flatten(1)), features


class Distillation(lightning.LightningModule):
    """cross-entropy + KD + CKA against a frozen teacher; without a teacher, cross-entropy alone."""

    def __init__(self, student: nn.Module, teacher: nn.Module | None = None, steps: int = 100, lr: float = 0.05):
        super().__init__()
        self.student, self.lr, self.steps = student, lr, steps
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False)
        self.kd = kd.losses.KDLoss(tau=4.0)
        # CKA ignores scale, so its gradient is largest at initialisation: it comes in over the first third.
        # widths may differ between the networks; rows="gap" compares samples by their mean over the positions
        self.cka = kd.losses.Ramp(kd.losses.CKALoss(rows="gap", weight=1.0), start=0, end=max(steps // 3, 1))

    def train(self, mode: bool = True):
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()  # Lightning switches every submodule
        return self

    def on_train_epoch_start(self):
        # a weight is a buffer: filled in place, it goes into checkpoints and recompiles nothing
        done = self.current_epoch / max(self.trainer.max_epochs, 1)
        self.kd.weight.fill_(1 - 0.5 * done)

    def training_step(self, batch, _):
        images, labels = batch
        logits, features = self.student(images)
        terms = {"ce": F.cross_entropy(logits, labels)}
        if self.teacher is not None:
            with torch.no_grad():
                teacher_logits, teacher_features = self.teacher(images)
            terms["kd"] = self.kd(logits, teacher_logits)
            terms["cka"] = self.cka(features, teacher_features)
        self.log_dict({name: term.detach() for name, term in terms.items()})
        return sum(terms.values())

    def validation_step(self, batch, _):
        images, labels = batch
        logits, _ = self.student(images)
        self.log("accuracy", (logits.argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.student.parameters(), lr=self.lr, momentum=0.9, nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, self.steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def digits(batch_size: int = 64) -> tuple[DataLoader, DataLoader]:
    """The 1797 images of 8 x 8 pixels that come with scikit-learn: 1297 to train on, 500 to validate."""
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images = (images.float() / 16).reshape(-1, 1, 8, 8)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, validation = (TensorDataset(images[part], labels[part]) for part in (shuffled[500:], shuffled[:500]))
    # a last batch too small for an estimator would only give 0 and warn; drop_last spares the warning
    return DataLoader(train, batch_size, shuffle=True, drop_last=True), DataLoader(validation, 500)


def fit(student: nn.Module, teacher: nn.Module | None, epochs: int, **options) -> tuple[Distillation, float]:
    """The trained module and its validation accuracy."""
    train, validation = digits()
    module = Distillation(student, teacher, steps=epochs * len(train))
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, train, validation)
    return module, float(trainer.callback_metrics["accuracy"])


def main(epochs: int = 4, seed: int = 0) -> dict[str, float]:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # of a small example: few workers, few steps, and a teacher that is meant to be in eval mode
    for message in ("many workers", "logging interval", "in eval mode"):
        warnings.filterwarnings("ignore", message=f".*{message}.*")
    lightning.seed_everything(seed, verbose=False)
    teacher, of_teacher = fit(Net(32), None, 2 * epochs)
    start = Net(4)
    accuracies = {"teacher": of_teacher}
    for name, guide in (("cross-entropy", None), ("distilled", teacher.student)):
        student = Net(4)
        student.load_state_dict(start.state_dict())
        accuracies[name] = fit(student, guide, epochs)[1]
    return accuracies


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4, help="of the student; the teacher gets twice as many")
    parser.add_argument("--seed", type=int, default=0)
    for name, accuracy in main(**vars(parser.parse_args())).items():
        print(f"{name:14s} {100 * accuracy:5.1f} % of the validation images")
