"""What a person does with runs and models: one module or package for each."""
