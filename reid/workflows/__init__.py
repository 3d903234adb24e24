"""What a person does with the framework, one module each."""
