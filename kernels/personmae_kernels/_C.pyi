# The compiled operators. Importing the module registers them as torch.ops.personmae.<name>; it holds no Python names.
