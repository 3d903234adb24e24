from setuptools import find_packages, setup

# Metadata stands in pyproject.toml. Here is only what it cannot say in a line: the projects'
# packages are installed beside `reid`, so that `PLUGINS: [tmgf]` is a plain import.
PROJECTS = {"cap": "projects/CAP/cap", "tmgf": "projects/TMGF/tmgf"}

setup(
    packages=[
        *find_packages(include=["reid", "reid.*"]),
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
        **{name: ["py.typed"] for name in PROJECTS},
    },
)
