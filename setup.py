from pathlib import Path

from setuptools import find_packages, setup

# Metadata stands in pyproject.toml. Here is only what it cannot say: the package of each folder of
# projects/ is installed as `reid.projects.NAME`.
PROJECTS = {
    f"reid.projects.{init.parent.name}": init.parent.as_posix()
    for init in sorted(Path("projects").glob("*/*/__init__.py"))
}
# Files that `reid/shipped.py` finds, in the layout of the repository.
SHIPPED = {
    f"reid.shipped.{folder.as_posix().replace('/', '.')}": folder.as_posix()
    for pattern in ("tools/*.py", "configs/**/*.yaml", "projects/*/tables.yaml",
                    "projects/*/configs/**/*.yaml", "projects/*/weights/*.safetensors")
    for folder in sorted({file.parent for file in Path().glob(pattern)})
}  # fmt: skip

setup(
    packages=[
        *find_packages(include=["reid", "reid.*"], exclude=PROJECTS),
        *PROJECTS,
        "reid.workflows.review.static",  # files alone, which setuptools calls a package too
        *(
            f"{name}.{sub}"
            for name, folder in PROJECTS.items()
            for sub in find_packages(where=folder)
        ),
        *SHIPPED,
    ],
    package_dir={**PROJECTS, **SHIPPED},
    package_data={
        "reid": ["py.typed"],
        "reid.workflows.report": ["*.j2"],
        "reid.workflows.review.static": ["*"],
        **{name: ["py.typed"] for name in PROJECTS},
        **{name: ["*.yaml", "*.safetensors"] for name in SHIPPED},
    },
)
