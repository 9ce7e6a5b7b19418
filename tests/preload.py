"What the fork server imports once, so that no forked process imports it again."

import contextlib
import importlib
import pkgutil

OTHERS = """
    IPython execnb.shell joblib matplotlib.pyplot matplotlib_inline.backend_inline nbdev.test
    nbformat pandas scipy.optimize scipy.sparse scipy.stats torch torch.distributed tqdm.auto
    transformers.models.auto.modeling_auto transformers.models.auto.tokenization_auto
    transformers.models.gemma2.modeling_gemma2
"""
for name in OTHERS.split():
    importlib.import_module(name)

package = importlib.import_module("atm_sae")
for _, name, _ in pkgutil.walk_packages(package.__path__, "atm_sae."):
    with contextlib.suppress(Exception):  # whoever needs a broken module says what is wrong with it
        importlib.import_module(name)

with contextlib.suppress(Exception):
    importlib.import_module("atm_sae.data.text").python_docs()  # read once: it takes seconds
