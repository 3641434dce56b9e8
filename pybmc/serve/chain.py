"""llama-server's fields about its chain of samplers:
those not here are refused where they would change a text."""

from __future__ import annotations

from math import inf

from .errors import unsupported
from .fields import Fields

ORDER = {                               # of the samplers, and what leaves one out
    "penalties": {"repeat_last_n": 0}, "top_k": {"top_k": 0}, "top_p": {"top_p": 1}, "min_p": {"min_p": 0},
    "temperature": {"temperature": 1},
}
OTHERS = ("dry", "top_n_sigma", "typ_p", "typical_p", "xtc", "adaptive_p", "infill")
OFF = {                                 # fields of other samplers, and the values that switch those off
    "dynatemp_range": (0, 0), "typical_p": (1, inf), "tfs_z": (1, inf), "top_n_sigma": (-inf, 0),
    "mirostat": (0, 0), "dry_multiplier": (0, 0), "xtc_probability": (0, 0), "adaptive_target": (-inf, -1),
}


def left_out(fields: Fields) -> dict:
    """Settings that leave out the samplers which `samplers` does not name. Refused: another order than ours,
    and other samplers unless they are switched off."""
    for name, (low, high) in OFF.items():
        neutral = low if low > -inf else high
        if not low <= fields.number(name, neutral) <= high:
            raise unsupported(name, f"is not supported here; expected {neutral:g}, which switches it off")
    if "samplers" not in fields:
        return {}
    names = fields.listed("samplers", 64)
    if not all(name in (*ORDER, *OTHERS) for name in names):
        fields.bad("samplers", "names among " + ", ".join([*ORDER, *OTHERS]))
    ours = [name for name in names if name in ORDER]
    if ours != [name for name in ORDER if name in ours]:
        raise unsupported("samplers", f"in another order than {', '.join(ORDER)} is not supported here")
    return {setting: value for name, off in ORDER.items() if name not in ours
            for setting, value in off.items()}
