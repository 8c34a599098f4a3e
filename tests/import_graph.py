"""The imports of nanochat_native: which module depends on which, and a picture of the packages.

    python tests/import_graph.py                         # lines of each package
    python tests/import_graph.py docs/import-graph.svg   # the picture

An arrow points from a package to one that it imports. An arrow that a path of other arrows implies is left out.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nanochat_native"
COMMANDS = "commands"  # the modules at the top of the package

Graph = dict[str, set[str]]


def module_of(path: Path) -> str:
    """nanochat_native/optim/muon.py -> nanochat_native.optim.muon."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def package_of(module: str) -> str:
    """nanochat_native.optim.muon -> optim; nanochat_native.train -> commands."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (PACKAGE / parts[1]).is_dir() else COMMANDS


def imports(tree: ast.AST) -> set[str]:
    """The modules of the package that a file imports, at its top, in functions and for type checkers."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import, line {node.lineno}"
            assert node.module is not None
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & MODULES.keys() or {node.module}
    return found & MODULES.keys() - {"nanochat_native"}  # which holds the version alone


def modules() -> Graph:
    """Each module with those that it imports."""
    return {name: imports(ast.parse(path.read_text())) - {name} for name, path in MODULES.items()}


def packages(graph: Graph) -> Graph:
    """Each package with the other packages that its modules import."""
    found: Graph = {package_of(module): set() for module in graph if module != "nanochat_native"}
    for module, imported in graph.items():
        if module != "nanochat_native":
            found[package_of(module)] |= {package_of(other) for other in imported} - {package_of(module)}
    return found


def reachable(graph: Graph, start: str) -> set[str]:
    """The nodes that can be reached from `start`."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for other in graph[waiting.pop()] - found:
            found.add(other)
            waiting.append(other)
    return found


def circles(graph: Graph) -> list[str]:
    """The nodes that can be reached from themselves."""
    return sorted(name for name in graph if name in reachable(graph, name))


def layers(graph: Graph) -> list[list[str]]:
    """The nodes of a graph without circles, the lowest layer first: a node stands above all that it depends on."""
    level: dict[str, int] = {}
    while len(level) < len(graph):
        for name, imported in graph.items():
            if name not in level and imported <= level.keys():
                level[name] = max((level[other] + 1 for other in imported), default=0)
    return [sorted(n for n in graph if level[n] == height) for height in range(max(level.values()) + 1)]


def without_implied(graph: Graph) -> Graph:
    """The graph without arrows that a path of others implies."""
    return {
        name: {other for other in imported if not any(other in reachable(graph, via) for via in imported - {other})}
        for name, imported in graph.items()
    }


WIDTH, HEIGHT, BOX_WIDTH, BOX_HEIGHT = 640, 76, 104, 30  # of the picture, a layer, a box; pixels


def lines_of(package: str) -> int:
    """Lines of Python in a package."""
    return sum(len(path.read_text().splitlines()) for name, path in MODULES.items() if package_of(name) == package)


def svg(graph: Graph) -> str:
    """A picture of the graph of packages, each a layer above what it depends on."""
    rows = layers(graph)
    center = {
        name: (WIDTH * (i + 0.5) / len(row), HEIGHT * (len(rows) - height - 0.5))
        for height, row in enumerate(rows)
        for i, name in enumerate(row)
    }
    arrows = [
        _arrow(center[name], center[other]) for name, others in without_implied(graph).items() for other in others
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT * len(rows)}" '
            'font-family="sans-serif" font-size="14" text-anchor="middle">',
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0 0 8 4 0 8z" fill="#666"/></marker></defs>',
            f'<rect width="{WIDTH}" height="{HEIGHT * len(rows)}" fill="#fff"/>',
            *sorted(arrows),
            *(_box(name, *center[name]) for row in rows for name in row),
            "</svg>\n",
        ]
    )


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> str:
    (x1, y1), (x2, y2) = start, end
    y1, y2 = y1 + BOX_HEIGHT / 2, y2 - BOX_HEIGHT / 2
    bend = (y2 - y1) / 2
    path = f"M{x1:.0f} {y1:.0f}C{x1:.0f} {y1 + bend:.0f} {x2:.0f} {y2 - bend:.0f} {x2:.0f} {y2:.0f}"
    return f'<path d="{path}" fill="none" stroke="#666" marker-end="url(#tip)"/>'


def _box(name: str, x: float, y: float) -> str:
    left, top = x - BOX_WIDTH / 2, y - BOX_HEIGHT / 2
    return (
        f'<rect x="{left:.0f}" y="{top:.0f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="5" fill="#eef3fa" '
        f'stroke="#38557d"/><text x="{x:.0f}" y="{y + 5:.0f}">{name}</text>'
    )


def main(args: list[str]) -> None:
    """Write the picture to the path that is given; without one print the lines of each package."""
    graph = packages(modules())
    if args:
        Path(args[0]).write_text(svg(graph))
        return
    for row in reversed(layers(graph)):
        print("  ".join(f"{name} {lines_of(name):,}" for name in row))


if __name__ == "__main__":
    main(sys.argv[1:])
