"""Single-path Bit Sharing: joint pruning and quantisation in one search (Liu et al., TPAMI 2023), in plain PyTorch."""

from sbs import models
from sbs.bops import pressure_for
from sbs.calibrate import calibrate, estimate_norms
from sbs.compiled import use_compiled
from sbs.convert import compress, freeze
from sbs.cost import CostReport, LayerCost, cost
from sbs.decide import at_rest
from sbs.errors import SbsError
from sbs.export import export, load_exported
from sbs.landing import Landing, bops_of, bops_range, land
from sbs.objective import after_step, bop_penalty, flips, margins, param_groups, telemetry
from sbs.policy import LayerPolicy, Policy
from sbs.space import SearchSpace
from sbs.supernet import SuperNet, prepare

__all__ = [
    "CostReport",
    "Landing",
    "LayerCost",
    "LayerPolicy",
    "Policy",
    "SbsError",
    "SearchSpace",
    "SuperNet",
    "after_step",
    "at_rest",
    "bop_penalty",
    "bops_of",
    "bops_range",
    "calibrate",
    "compress",
    "cost",
    "estimate_norms",
    "export",
    "flips",
    "freeze",
    "land",
    "load_exported",
    "margins",
    "models",
    "param_groups",
    "prepare",
    "pressure_for",
    "telemetry",
    "use_compiled",
]
