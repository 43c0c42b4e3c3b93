import equinox as eqx

from ..layers import Stacked
from ..models import LanguageModel


def separated(model: LanguageModel) -> LanguageModel:
    """Returns a model whose stacked layers have separate weights, which no token copies."""
    if not isinstance(model.layers, Stacked):
        return model
    return eqx.tree_at(lambda model: model.layers, model, model.layers.separate())
