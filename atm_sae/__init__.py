"""Sparse autoencoders with Adaptive Temporal Masking, and tests of feature absorption."""

__version__ = "0.1.0"

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

# The public names, module by module. A module is imported when one of its names is first used,
# so that `import atm_sae` and `atm-sae --help` need no PyTorch. To add a name: one entry here,
# and the same in the imports below (a test compares).
_NAMES = {
    "methods": ["METHODS"],
    "data.planted": ["PlantedWorld", "WorldBatches", "WorldConfig"],
    "data.lm": ["load_lm", "residual_stream", "splice"],
    "data.activations": ["ActivationSpec", "get_activations"],
    "data.batches": ["held_out"],
    "sae.architectures": ["SAEConfig"],
    "sae.sae": ["SAE"],
    "sae.atm": ["ATMConfig", "ATMMasker", "UniformMasker"],
    "sae.formats": ["export_sae", "from_pretrained", "model_card", "push_to_hub"],
    "train.loop": ["TrainConfig", "train"],
    "train.training_log": ["TrainingLog"],
    "train.runs": ["RunSpec", "get_run", "grid", "recipe", "run_grid"],
    "evals.metrics": [
        "dictionary_agreement",
        "planted_metrics",
        "reconstruction_metrics",
        "spliced_metrics",
    ],
    "evals.first_letter": ["FirstLetterTask", "get_task", "get_tasks"],
    "evals.absorption": ["best_single_latent_f1", "evaluate_absorption"],
    "evals.probing": ["evaluate_probing", "probing_tasks"],
    "evals.probing_sets": ["dataset_tasks"],
    "evals.sae_probes": ["evaluate_sae_probes", "sae_probes_tasks"],
    "evals.saebench": ["absorption_json", "core_json", "probing_json", "read_saebench"],
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = list(_HOME)

if TYPE_CHECKING:  # what type checkers and editors read; `X as X` says that X is public
    from atm_sae.methods import METHODS as METHODS
    from atm_sae.data.planted import (
        PlantedWorld as PlantedWorld,
        WorldBatches as WorldBatches,
        WorldConfig as WorldConfig,
    )
    from atm_sae.data.lm import (
        load_lm as load_lm,
        residual_stream as residual_stream,
        splice as splice,
    )
    from atm_sae.data.activations import (
        ActivationSpec as ActivationSpec,
        get_activations as get_activations,
    )
    from atm_sae.data.batches import held_out as held_out
    from atm_sae.sae.architectures import SAEConfig as SAEConfig
    from atm_sae.sae.sae import SAE as SAE
    from atm_sae.sae.atm import (
        ATMConfig as ATMConfig,
        ATMMasker as ATMMasker,
        UniformMasker as UniformMasker,
    )
    from atm_sae.sae.formats import (
        export_sae as export_sae,
        from_pretrained as from_pretrained,
        model_card as model_card,
        push_to_hub as push_to_hub,
    )
    from atm_sae.train.loop import TrainConfig as TrainConfig, train as train
    from atm_sae.train.training_log import TrainingLog as TrainingLog
    from atm_sae.train.runs import (
        RunSpec as RunSpec,
        get_run as get_run,
        grid as grid,
        recipe as recipe,
        run_grid as run_grid,
    )
    from atm_sae.evals.metrics import (
        dictionary_agreement as dictionary_agreement,
        planted_metrics as planted_metrics,
        reconstruction_metrics as reconstruction_metrics,
        spliced_metrics as spliced_metrics,
    )
    from atm_sae.evals.first_letter import (
        FirstLetterTask as FirstLetterTask,
        get_task as get_task,
        get_tasks as get_tasks,
    )
    from atm_sae.evals.absorption import (
        best_single_latent_f1 as best_single_latent_f1,
        evaluate_absorption as evaluate_absorption,
    )
    from atm_sae.evals.probing import (
        evaluate_probing as evaluate_probing,
        probing_tasks as probing_tasks,
    )
    from atm_sae.evals.probing_sets import dataset_tasks as dataset_tasks
    from atm_sae.evals.sae_probes import (
        evaluate_sae_probes as evaluate_sae_probes,
        sae_probes_tasks as sae_probes_tasks,
    )
    from atm_sae.evals.saebench import (
        absorption_json as absorption_json,
        core_json as core_json,
        probing_json as probing_json,
        read_saebench as read_saebench,
    )


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    "A package whose names are not hidden by modules of the same name: `train` is the function."

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
