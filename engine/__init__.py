"""The trainer: everything between a concept's file and a trained model.

It finds the files that a run is made of, reads flags, prepares batches, updates weights on one or many
processes, saves and resumes, and reports. It imports no concept: contract.py looks them up by name. Read
contract, options, settings, run, trainable, device, batches, parallel, optim, adam, averages, checkpoint,
log, progress, pictures, report, charts, compare, watch, activations, memory, benchmark, cpu.
"""
