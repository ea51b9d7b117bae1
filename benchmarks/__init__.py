"""Measurements that anyone can repeat; results/ holds what they printed on the machines named in it."""
