"""One library trains SAEs on given batches and says how long each step took; `training.py` runs it
in each library's own environment.

    python training_worker.py atm-sae TASK_FOLDER '[["topk", "sae-lens"]]' --threads 2

TASK_FOLDER holds `task.json` (sizes and recipes), `batches.safetensors` (steps, batch, d_in) and
`start.safetensors` (the first weights). Each pair names a method and the library whose recipe is
used. Every library starts from the same weights, sees the same batches in the same order, and uses
the same learning rate without a schedule; times are those between two requests for a batch, so
that they hold everything a step does, and nothing else. The results are written to
`results.json` and `0.safetensors`, `1.safetensors`, ... in TASK_FOLDER.
"""

import argparse
import gc
import importlib
import json
import time
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TOGETHER = "several"  # the method that trains several TopK SAEs on the same batches


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
        return self.batch((len(self.at) - 1) % len(self.x))

    def batch(self, i):
        "Batch `i`, (batch, d_in)."
        return self.x[i]

    def seconds(self):
        "Time of each step, the last one until now."
        moments = self.at + [time.perf_counter()]
        return [b - a for a, b in zip(moments, moments[1:])]


class StreamedBatches(Batches):
    "Batches that a language model with random weights computes when they are asked for."

    def __init__(self, model, batch_size, n_batches):
        from transformers import LlamaConfig, LlamaModel

        torch.manual_seed(0)
        config = LlamaConfig(**model["shape"])
        self.model = LlamaModel(config).to(getattr(torch, model["dtype"])).eval()
        rows = (n_batches, batch_size // model["context"], model["context"])
        super().__init__(torch.randint(config.vocab_size, rows))
        self.d_in, self.scale = config.hidden_size, 1.0
        self.scale = self.batch(0).square().sum(1).mean().sqrt().reciprocal()  # E|x|^2 = 1

    @torch.no_grad()
    def batch(self, i):
        hidden = self.model(self.x[i]).last_hidden_state
        return hidden.flatten(0, 1).float() * self.scale


def settings(method, task):
    "Of our SAE's architecture, from the task."
    names = dict(standard=("l1",), gated=("l1",), jumprelu=("l0_coef", "bandwidth", "target_l0"))
    return {name: task.get(name) for name in names.get(method, ("k",))}


def group_shares(prefixes):
    "Shares of the groups between nested dictionaries."
    return [end - begin for begin, end in zip([0, *prefixes], prefixes)]


# ---- ours


def our_trainer(method, task, start, batches):
    from atm_sae.sae.sae import SAE, SAEConfig
    from atm_sae.train.loop import TrainConfig, Trainer

    sae = SAE(SAEConfig(task["d_in"], task["d_sae"], method, **settings(method, task)))
    own = sae.state_dict()  # of BatchTopK a single threshold, and not one for each latent
    same = {n: t for n, t in start.items() if n in own and own[n].shape == t.shape}
    sae.load_state_dict(own | same)
    config = TrainConfig(
        task["steps"],
        task["batch_size"],
        task["lr"],
        lr_warmup=0,
        lr_decay=0,
        sparsity_warmup=0,
        dead_after=2,
        grad_clip=task.get("grad_clip", 1.0),
        precision="fp32",
    )
    return Trainer(sae, batches, config)


def our_training(trainers):
    "Train on one pass; the weights of each."
    from atm_sae.train.loop import train_together

    for error in train_together(trainers, progress=False):
        if error is not None:
            raise error
    return [dict(trainer.sae.state_dict()) for trainer in trainers]


def atm_sae(method, task, start, batches):
    (weights,) = our_training([our_trainer(method, task, start, batches)])
    return batches.seconds(), weights


def several_atm_sae(tasks, start, batches, together=True):
    trainers = [our_trainer("topk", task, start, batches) for task in tasks]
    groups = [trainers] if together else [[trainer] for trainer in trainers]
    weights = [one for group in groups for one in our_training(group)]
    return batches.seconds(), weights


# ---- dictionary_learning


DICTIONARY_LEARNING = {  # module and class of the trainer of each method
    "topk": ("top_k", "TopKTrainer"),
    "batchtopk": ("batch_top_k", "BatchTopKTrainer"),
    "matryoshka": ("matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer"),
    "standard": ("standard", "StandardTrainer"),
    "gated": ("gdm", "GatedSAETrainer"),
    "jumprelu": ("jumprelu", "JumpReluTrainer"),
}


def dictionary_learning_settings(method, task):
    "Those arguments of a trainer that depend on the method."
    if method in ("standard", "gated"):
        return dict(l1_penalty=task["l1"], sparsity_warmup_steps=0)
    if method == "jumprelu":
        return dict(
            bandwidth=task["bandwidth"],
            sparsity_penalty=task["l0_coef"],
            target_l0=task["target_l0"],
            sparsity_warmup_steps=0,
        )
    nested = dict(group_fractions=group_shares(task["prefixes"]))
    more = nested if method == "matryoshka" else {}
    return dict(k=task["k"], threshold_start_step=0, **more)


def dictionary_learning_trainer(method, task):
    "The trainer of dictionary_learning for a method."
    module, name = DICTIONARY_LEARNING[method]
    trainer = getattr(importlib.import_module(f"dictionary_learning.trainers.{module}"), name)(
        steps=task["steps"],
        activation_dim=task["d_in"],
        dict_size=task["d_sae"],
        layer=0,
        lm_name="none",
        lr=task["lr"],
        warmup_steps=0,
        device="cpu",
        **dictionary_learning_settings(method, task),
    )
    for group in trainer.optimizer.param_groups:
        group["betas"] = (0.9, 0.999)  # as the others have
    return trainer


def dictionary_learning_weights(ae, method):
    "{our name: its tensor}, views that can be written to."
    if method in ("jumprelu", "matryoshka"):
        names = ["W_enc", "W_dec", "b_enc", "b_dec", *["threshold"] * (method == "jumprelu")]
        return {name: getattr(ae, name).data for name in names}
    own = dict(W_enc=ae.encoder.weight.data.T, W_dec=ae.decoder.weight.data.T)
    if method == "gated":
        own |= dict(b_enc=ae.gate_bias.data, b_dec=ae.decoder_bias.data)
        return own | dict(r_mag=ae.r_mag.data, b_mag=ae.mag_bias.data)
    b_dec = ae.bias if method == "standard" else ae.b_dec
    return own | dict(b_enc=ae.encoder.bias.data, b_dec=b_dec.data)


def started_dictionary_learning(method, task, start):
    "A trainer with the first weights."
    trainer = dictionary_learning_trainer(method, task)
    own = dictionary_learning_weights(trainer.ae, method)
    for name, tensor in own.items():
        tensor.copy_(start[name]) if name in start else tensor.zero_()
    if method == "jumprelu":  # its encoder does not subtract b_dec
        own["b_enc"].sub_(start["b_dec"] @ start["W_enc"])
    return trainer


def dictionary_learning(method, task, start, batches):
    trainer = started_dictionary_learning(method, task, start)
    for i in range(task["steps"]):
        trainer.update(i, next(batches))
    seconds = batches.seconds()
    found = dictionary_learning_weights(trainer.ae, method)
    weights = {name: tensor.clone() for name, tensor in found.items()}
    if method == "jumprelu":
        weights["b_enc"] += weights["b_dec"] @ weights["W_enc"]
    return seconds, weights


def several_dictionary_learning(tasks, start, batches):
    from dictionary_learning.training import trainSAE

    trainers = [started_dictionary_learning("topk", task, start) for task in tasks]
    configs = [dict(trainer=lambda trainer=trainer: trainer) for trainer in trainers]
    trainSAE(batches, configs, tasks[0]["steps"], device="cpu")
    seconds = batches.seconds()
    return seconds, [dictionary_learning_weights(trainer.ae, "topk") for trainer in trainers]


# ---- SAELens


def sae_lens_sae(method, task, start, sparse=False):
    "An SAE of SAELens with the first weights."
    from sae_lens import saes

    common = dict(d_in=task["d_in"], d_sae=task["d_sae"], apply_b_dec_to_input=True)
    if method == "topk":
        kind, more = "TopK", dict(k=task["k"], use_sparse_activations=sparse)
    if method == "batchtopk":
        kind, more = "BatchTopK", dict(k=task["k"])
    if method == "matryoshka":
        widths = [round(share * task["d_sae"]) for share in task["prefixes"]]
        kind, more = "MatryoshkaBatchTopK", dict(k=task["k"], matryoshka_widths=widths)
    if method in ("standard", "gated"):
        kind, more = method.capitalize(), dict(l1_coefficient=task["l1"])
    if method == "jumprelu":
        kind = "JumpReLU"
        more = dict(l0_coefficient=task["l0_coef"], jumprelu_bandwidth=task["bandwidth"])
    config = getattr(saes, f"{kind}TrainingSAEConfig")(**more, **common)
    sae = getattr(saes, f"{kind}TrainingSAE")(config)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            ours = "b_enc" if name == "b_gate" else name
            parameter.copy_(start[ours]) if ours in start else parameter.zero_()
    return sae


def sae_lens_config(task):
    from sae_lens.config import SAETrainerConfig

    return SAETrainerConfig(
        total_training_samples=task["steps"] * task["batch_size"],
        train_batch_size_samples=task["batch_size"],
        lr=task["lr"],
        lr_end=task["lr"],
    )


def sae_lens_weights(sae):
    "{our name: tensor}."
    found = {name: parameter.detach() for name, parameter in sae.named_parameters()}
    return {"b_enc" if name == "b_gate" else name: tensor for name, tensor in found.items()}


def sae_lens(method, task, start, batches, sparse=False):
    from sae_lens.training.sae_trainer import SAETrainer

    sae = sae_lens_sae(method, task, start, sparse)
    SAETrainer(sae_lens_config(task), sae, batches).fit()
    return batches.seconds(), sae_lens_weights(sae)


def several_sae_lens(tasks, start, batches, together=True):
    from sae_lens.training.multi_sae_trainer import MultiSAETrainer
    from sae_lens.training.sae_trainer import SAETrainer

    saes = [sae_lens_sae("topk", task, start) for task in tasks]
    config = sae_lens_config(tasks[0])
    if together:
        named = {str(i): sae for i, sae in enumerate(saes)}
        hooks = dict.fromkeys(named, "x")
        MultiSAETrainer(config, named, hooks, (dict(x=x) for x in batches)).fit()
    else:
        for trainer in [SAETrainer(config, sae, batches) for sae in saes]:
            trainer.fit()
    return batches.seconds(), [*map(sae_lens_weights, saes)]


# ---- the command


LIBRARIES = {
    "atm-sae": atm_sae,
    "dictionary-learning": dictionary_learning,
    "sae-lens": sae_lens,
    "sae-lens, sparse": partial(sae_lens, sparse=True),
}
ONE_PASS, IN_TURN = "one pass", "one after the other"  # ways to train several SAEs
SEVERAL = {
    ("atm-sae", ONE_PASS): several_atm_sae,
    ("atm-sae", IN_TURN): partial(several_atm_sae, together=False),
    ("dictionary-learning", ONE_PASS): several_dictionary_learning,
    ("sae-lens", ONE_PASS): several_sae_lens,
    ("sae-lens", IN_TURN): partial(several_sae_lens, together=False),
}


def train_one(library, method, recipe, task, folder):
    "Seconds of each step, and the weights."
    task = task | task["recipes"].get(f"{method} of {recipe}", {})
    batches = Batches(load_file(folder / "batches.safetensors")["x"])
    start = load_file(folder / "start.safetensors")
    seconds, weights = LIBRARIES[library](method, task, start, batches)
    return seconds[: task["steps"]], weights


def train_several(library, kind, way, task, folder):
    """Seconds of a step of all SAEs, and the weights {number.name: tensor}. `kind`: 'cached' or
    'streamed' batches; `way`: ONE_PASS or IN_TURN."""
    steps, tasks = task["steps"], [task | dict(k=k) for k in task["ks"]]
    start = load_file(folder / "start.safetensors")
    if kind == "cached":
        batches = Batches(load_file(folder / "batches.safetensors")["x"])
    else:
        batches = StreamedBatches(task["model"], task["batch_size"], steps)
        start["b_dec"] = start["b_dec of streamed"]
    seconds, weights = SEVERAL[library, way](tasks, start, batches)
    if way == IN_TURN:
        seconds = [sum(seconds[i::steps]) for i in range(steps)]
    named = {f"{i}.{n}": w for i, one in enumerate(weights) for n, w in one.items()}
    return seconds[:steps], named


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("task", type=Path)
    parser.add_argument("jobs", help="JSON: pairs [method, library of the recipe], or triples")
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    task, found = json.loads((a.task / "task.json").read_text()), []
    for i, job in enumerate(json.loads(a.jobs)):
        if job[0] == TOGETHER:
            seconds, weights = train_several(a.library, *job[1:], task, a.task)
        else:
            seconds, weights = train_one(a.library, *job, task, a.task)
        plain = {name: w.detach().contiguous() for name, w in weights.items()}
        save_file(plain, a.task / f"{i}.safetensors")
        found.append(dict(seconds=seconds, torch=torch.__version__))
        del weights, plain
        gc.collect()
    (a.task / "results.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
