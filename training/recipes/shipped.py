"""The recipes that come with the package."""

from importlib import resources


def shipped() -> dict[str, str]:
    """Name -> text of the file."""
    files = resources.files(__package__).iterdir()
    found = {file.name.removesuffix(".yaml"): file for file in files if file.name.endswith(".yaml")}
    return {name: found[name].read_text(encoding="utf-8") for name in sorted(found)}


def first_line(text: str) -> str:
    """What a recipe says of itself in the first line."""
    return text.splitlines()[0].lstrip("# ")


def shipped_recipe(name: str) -> str:
    """Raises ValueError if there is none of this name."""
    known = shipped()
    name = name.removesuffix(".yaml")
    if name not in known:
        from .checks import unknown

        raise ValueError(f"{name}: {unknown(name, known, 'recipe')}")
    return known[name]
