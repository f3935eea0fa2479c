"""Self-contained HTML pages: each is one file that needs no network."""

import os

import jinja2

from tdpo.files import replaced_whole

TEMPLATES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "templates")


def write_page(name: str, out: str, **values: object) -> None:
    """Render a template to a file.

    Args:
        name: templates/<name>.html.
        out: path of the page.
        values: the variables of the template.
    """
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    with replaced_whole(out) as file:
        file.write(environment.get_template(f"{name}.html").render(values))
