"""One library trains one SAE on given batches and says how long each step took; `training.py` runs
it in each library's own environment.

    python training_worker.py atm-sae topk TASK_FOLDER RESULT.json --threads 2

TASK_FOLDER holds `task.json` (sizes and recipes), `batches.safetensors` (steps, batch, d_in) and
`start.safetensors` (the first weights). Every library starts from the same weights, sees the same
batches in the same order, and uses the same learning rate without a schedule; times are those
between two requests for a batch, so that they hold everything a step does, and nothing else.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


class Batches:
    "The batches over and over; remembers when each was asked for."

    def __init__(self, x):
        self.x, self.at, self.d_in = x, [], x.shape[-1]

    def state_dict(self):
        return dict(asked=len(self.at))

    def load_state_dict(self, state):
        "Nothing: the batches are the same all over."

    def __iter__(self):
        return self

    def __next__(self):
        self.at.append(time.perf_counter())
        return self.x[(len(self.at) - 1) % len(self.x)]

    def seconds(self):
        "Time of each step, the last one until now."
        moments = self.at + [time.perf_counter()]
        return [b - a for a, b in zip(moments, moments[1:])]


def settings(method, task):
    "Of our SAE's architecture, from the task."
    names = dict(standard=("l1",), gated=("l1",), jumprelu=("l0_coef", "bandwidth", "target_l0"))
    return {name: task.get(name) for name in names.get(method, ("k",))}


def atm_sae(method, task, start, batches):
    from atm_sae.sae.sae import SAE, SAEConfig
    from atm_sae.train.loop import TrainConfig, train

    sae = SAE(SAEConfig(task["d_in"], task["d_sae"], method, **settings(method, task)))
    own = sae.state_dict()  # of BatchTopK a single threshold, and not one for each latent
    same = {n: t for n, t in start.items() if n in own and own[n].shape == t.shape}
    sae.load_state_dict(own | same)
    steps = task["steps"]
    config = TrainConfig(
        steps,
        task["batch_size"],
        task["lr"],
        lr_warmup=0,
        lr_decay=0,
        sparsity_warmup=0,
        dead_after=2,
        grad_clip=task.get("grad_clip", 1.0),
    )
    train(sae, batches, config, progress=False)
    seconds = batches.seconds()
    return seconds, {n: p.detach() for n, p in sae.state_dict().items()}


def dictionary_learning_trainer(method, task):
    "The trainer of dictionary_learning for a method."
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    d_in, d_sae = task["d_in"], task["d_sae"]
    common = dict(
        steps=task["steps"],
        activation_dim=d_in,
        dict_size=d_sae,
        layer=0,
        lm_name="none",
        lr=task["lr"],
        warmup_steps=0,
        device="cpu",
    )
    if method == "topk":
        trainer = TopKTrainer(k=task["k"], **common)
    if method == "standard":
        trainer = StandardTrainer(l1_penalty=task["l1"], sparsity_warmup_steps=0, **common)
    if method == "jumprelu":
        trainer = JumpReluTrainer(
            bandwidth=task["bandwidth"],
            sparsity_penalty=task["l0_coef"],
            target_l0=task["target_l0"],
            sparsity_warmup_steps=0,
            **common,
        )
        for group in trainer.optimizer.param_groups:
            group["betas"] = (0.9, 0.999)  # as the others have
    return trainer


def dictionary_learning(method, task, start, batches):
    trainer = dictionary_learning_trainer(method, task)
    ae = trainer.ae
    if method == "jumprelu":
        own = dict(
            W_enc=ae.W_enc, W_dec=ae.W_dec, b_enc=ae.b_enc, b_dec=ae.b_dec, threshold=ae.threshold
        )
    else:
        own = dict(
            W_enc=ae.encoder.weight.T,
            W_dec=ae.decoder.weight.T,
            b_enc=ae.encoder.bias,
            b_dec=ae.bias if method == "standard" else ae.b_dec,
        )
    for n, p in own.items():
        p.data.copy_(start[n])
    shift = (
        start["b_dec"] @ start["W_enc"] if method == "jumprelu" else 0
    )  # its encoder does not subtract b_dec
    own["b_enc"].data.sub_(shift)
    for i in range(task["steps"]):
        trainer.update(i, next(batches))
    seconds = batches.seconds()
    if method == "topk":
        own["b_dec"] = ae.b_dec
    weights = {n: p.detach().clone() for n, p in own.items()}
    if method == "jumprelu":
        weights["b_enc"] += weights["b_dec"] @ weights["W_enc"]
    return seconds, weights


def sae_lens(method, task, start, batches, sparse=False):
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    common = dict(d_in=task["d_in"], d_sae=task["d_sae"], apply_b_dec_to_input=True)
    if method == "topk":
        sae = TopKTrainingSAE(
            TopKTrainingSAEConfig(k=task["k"], use_sparse_activations=sparse, **common)
        )
    if method == "standard":
        sae = StandardTrainingSAE(StandardTrainingSAEConfig(l1_coefficient=task["l1"], **common))
    if method == "jumprelu":
        sae = JumpReLUTrainingSAE(
            JumpReLUTrainingSAEConfig(
                l0_coefficient=task["l0_coef"], jumprelu_bandwidth=task["bandwidth"], **common
            )
        )
    with torch.no_grad():
        for n, p in sae.named_parameters():
            p.copy_(start[n])
    config = SAETrainerConfig(
        total_training_samples=task["steps"] * task["batch_size"],
        train_batch_size_samples=task["batch_size"],
        lr=task["lr"],
        lr_end=task["lr"],
    )
    trainer = SAETrainer(config, sae, batches)
    trainer.fit()
    seconds = batches.seconds()
    return seconds, {n: p.detach() for n, p in sae.named_parameters()}


LIBRARIES = {
    "atm-sae": atm_sae,
    "dictionary-learning": dictionary_learning,
    "sae-lens": sae_lens,
    "sae-lens, sparse": lambda *a: sae_lens(*a, sparse=True),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("method")
    parser.add_argument("task", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--recipe-of",
        help="a rival whose recipe differs, see task.json; default: the library's own",
    )
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    task = json.loads((a.task / "task.json").read_text())
    task |= task["recipes"].get(f"{a.method} of {a.recipe_of or a.library}", {})
    batches = Batches(load_file(a.task / "batches.safetensors")["x"])
    seconds, weights = LIBRARIES[a.library](
        a.method, task, load_file(a.task / "start.safetensors"), batches
    )
    save_file({n: w.contiguous() for n, w in weights.items()}, a.result.with_suffix(".safetensors"))
    a.result.write_text(
        json.dumps(
            dict(
                library=a.library,
                method=a.method,
                threads=a.threads,
                seconds=seconds[: task["steps"]],
                torch=torch.__version__,
            )
        )
    )


if __name__ == "__main__":
    main()
