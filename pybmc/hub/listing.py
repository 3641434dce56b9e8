"""What `pybmc list` shows: the models that are here, and whether they run."""

from .. import demo_model
from ..errors import BmcError, printable
from ..show import describe, size
from . import names, store


def entries() -> list[dict]:
    """Facts about each model, the bundled pair last."""
    found = [_entry(model.name, model.path, names.quant_of(model.path.name),
                    None if model.complete else "some of its parts are missing") for model in store.models()]
    for name, draft in store.BUNDLED.items():
        try:
            found.append(_entry(name, demo_model(draft)))
        except BmcError:                # an installation without it
            pass
    return found


def _entry(name, path, quant=None, why_not=None) -> dict:
    facts = {}
    try:
        facts = describe(path) if why_not is None else {}
        why_not = why_not or facts["why_not"]
    except (BmcError, OSError) as error:
        why_not = str(error).removeprefix(f"{path}: ")
    nbytes = facts.get("bytes") or path.stat().st_size
    main_type = next(iter(facts.get("types") or ()), None)
    return {"name": name, "bytes": nbytes, "size": size(nbytes),
            "quantization": quant or (main_type and main_type.upper()),
            "architecture": facts.get("architecture"),
            "runs": why_not is None, "why_not": why_not and printable(why_not), "path": str(path)}
