"""A model that is laid over several devices, whole blocks on each, by accelerate; what passes between them it moves."""

from collections.abc import Callable, Mapping
from typing import Any

_PLACES = "hf_device_map"
"""Under this name such a model has the device of each of its modules."""


def find_places(model: Any) -> Mapping[str, Any] | None:
    """The device of each module of a model that is laid over several, by its name; None of one that is not."""
    places: Mapping[str, Any] | None = getattr(model, _PLACES, None)
    return places


def spread_beside(places: Mapping[str, Any], model: Any, rename: Callable[[str], str | None]) -> Any:
    """A model laid over the devices that another has these `places` on; `rename` gives a module's name there the one
    that it has here, or none where it is not here."""
    import accelerate

    own = {new: place for name, place in places.items() if (new := rename(name))}
    return accelerate.dispatch_model(model, own, skip_keys=model._skip_keys_device_placement)
