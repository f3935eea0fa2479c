"""Pages of one file, without a network: templates/<name>.html, filled."""

import os

import jinja2

TEMPLATES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "templates")


def write_page(name: str, out: str, **values: object) -> None:
    """Write a page; `values` are what its template names."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    with open(out, "w", encoding="utf-8") as file:
        file.write(environment.get_template(f"{name}.html").render(values))
