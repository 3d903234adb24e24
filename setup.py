from pathlib import Path

from setuptools import find_packages, setup

# Metadata stands in pyproject.toml. Here is only what it cannot say: the package of each folder of
# projects/ is installed as `reid.projects.NAME`.
PROJECTS = {
    f"reid.projects.{init.parent.name}": init.parent.as_posix()
    for init in sorted(Path("projects").glob("*/*/__init__.py"))
}

setup(
    packages=[
        *find_packages(include=["reid", "reid.*"], exclude=PROJECTS),
        *PROJECTS,
        *(
            f"{name}.{sub}"
            for name, folder in PROJECTS.items()
            for sub in find_packages(where=folder)
        ),
    ],
    package_dir=PROJECTS,
    package_data={
        "reid": ["py.typed"],
        "reid.workflows.report": ["*.j2"],
        "reid.workflows.review": ["static/*"],
        **{name: ["py.typed"] for name in PROJECTS},
    },
)
