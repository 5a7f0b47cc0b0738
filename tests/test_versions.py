"""All of RecBole's models on data in which something of each column is missing, on the libraries
that are installed."""

import importlib.util
import re

from tests.versions import differences, fate, model_settings, write_holes

LIBRARIES = {
    "KGAT": "dgl",
    "KGIN": "torch_scatter",
    "MCCLK": "torch_scatter",
    "NCL": "faiss",
    "lightgbm": "lightgbm",
    "xgboost": "lightgbm",
}
"""Of RecBole's models what they need, and RecBole does not ask for."""

ERRORS = {
    "DSSM": "split_with_sizes expects",
    "GRU4RecCPR": "selected index k out of range",
    "GRU4RecKG": "there is no file /holes/holes.ent",
    "KD_DAGFM": "shape mismatch",
    "KSR": "there is no file /holes/holes.ent",
    "SASRecCPR": "selected index k out of range",
}
"""What others end with: they want other data, or larger."""


def test_all_models_of_recbole(tmp_path):
    """About a minute. Where an old name of a library is gone, a model ends with an error of
    Python; where holes stay, with NaN."""
    data_path, wrong = write_holes(tmp_path), {}
    for model, names in model_settings().items():
        found = fate(model, names, data_path, tmp_path)
        if model in ERRORS:
            right = isinstance(found, str) and re.search(ERRORS[model], found)
        elif model in LIBRARIES and importlib.util.find_spec(LIBRARIES[model]) is None:
            right = isinstance(found, str) and "No module named" in found
        else:
            right = (
                isinstance(found, dict)
                and len(found) == 6
                and all(0 <= metric <= 1 for metric in found.values())
            )
        if not right:
            wrong[model] = found
    assert not wrong and len(model_settings()) > 90


def test_differences_are_named():
    one, other = {"a": {"b": [1], "c": 2}, "d": 3}, {"a": {"b": [2], "c": 2}}
    assert differences(one, other) == ["a / b: [1] and [2]", "d: 3 and None"]
    assert not differences(one, one)
