"""The paper's studies, regenerated: one file each, on a lab that keeps what it has trained and measured."""
