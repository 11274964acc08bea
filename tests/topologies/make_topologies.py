#!/usr/bin/env python3
"""Writes the hwloc XML files (format 2.0) of machines that were made up for planning: hgx8.xml, a node
of 8 NVIDIA H100 behind NVSwitch with 8 network devices; mixed.xml, a workstation with one fast GPU,
one slow GPU of another vendor and a CPU. The numbers are those of data sheets, not of one machine."""
import os

HERE = os.path.dirname(os.path.abspath(__file__))


def mask(first, count):
    bits = ((1 << count) - 1) << first
    words = []
    while bits or not words:
        words.append("0x%08x" % (bits & 0xFFFFFFFF))
        bits >>= 32
    return ",".join(reversed(words))


class Machine:
    def __init__(self, product, cores, packages):
        self.index = 0
        self.out = []
        self.product, self.cores, self.packages = product, cores, packages
        self.sets = lambda first, count, nodes: (
            'cpuset="{0}" complete_cpuset="{0}" allowed_cpuset="{0}" nodeset="{1}" '
            'complete_nodeset="{1}" allowed_nodeset="{1}"').format(mask(first, count), nodes)

    def number(self):
        self.index += 1
        return self.index

    def write(self, line):
        self.out.append(line)

    def info(self, name, value):
        self.write('<info name="%s" value="%s"/>' % (name, value))

    def begin(self):
        total = self.cores * self.packages
        self.write('<?xml version="1.0" encoding="UTF-8"?>')
        self.write('<!DOCTYPE topology SYSTEM "hwloc2.dtd">')
        self.write('<topology version="2.0">')
        self.write('<object type="Machine" os_index="0" %s gp_index="%d">'
                   % (self.sets(0, total, hex((1 << self.packages) - 1)), self.number()))
        self.info("DMIProductName", self.product)
        self.info("Architecture", "x86_64")

    def package(self, p, model, memory):
        first, nodes = p * self.cores, hex(1 << p)
        sets = self.sets(first, self.cores, nodes)
        self.write('<object type="Package" os_index="%d" %s gp_index="%d">' % (p, sets, self.number()))
        self.info("CPUModel", model)
        self.write('<object type="NUMANode" os_index="%d" %s gp_index="%d" local_memory="%d"/>'
                   % (p, sets, self.number(), memory))
        for c in range(first, first + self.cores):
            one = self.sets(c, 1, nodes)
            self.write('<object type="Core" os_index="%d" %s gp_index="%d">' % (c, one, self.number()))
            self.write('<object type="PU" os_index="%d" %s gp_index="%d"/></object>' % (c, one, self.number()))

    def root(self, bus):
        self.write('<object type="Bridge" gp_index="%d" bridge_type="0-1" depth="0" '
                   'bridge_pci="0000:[%02x-%02x]">' % (self.number(), bus, bus + 1))

    def pci(self, bus, kind, vendor, speed):
        self.write('<object type="PCIDev" gp_index="%d" pci_busid="0000:%02x:00.0" '
                   'pci_type="%s [%s:0000] [0000:0000] 00" pci_link_speed="%f">'
                   % (self.number(), bus, kind, vendor, speed))

    def osdev(self, name, kind, subtype, infos):
        n = self.number()
        self.write('<object type="OSDev" gp_index="%d" name="%s" subtype="%s" osdev_type="%d">'
                   % (n, name, subtype, kind))
        for key, value in infos:
            self.info(key, value)
        self.end()
        return n

    def end(self):
        self.write('</object>')

    def numa(self, far):
        n = self.packages
        values = " ".join(str(10 if a == b else far) for a in range(n) for b in range(n)) + " "
        indexes = " ".join(str(a) for a in range(n)) + " "
        self.write('<distances2 type="NUMANode" nbobjs="%d" kind="5" name="NUMALatency" indexing="os">'
                   '<indexes length="%d">%s</indexes><u64values length="%d">%s</u64values></distances2>'
                   % (n, len(indexes), indexes, len(values), values))

    def nvlink(self, devices, rate):
        n = len(devices)
        self.write('<distances2 type="OSDev" nbobjs="%d" kind="9" name="NVLinkBandwidth" indexing="gp">' % n)
        indexes = " ".join(map(str, devices)) + " "
        self.write('<indexes length="%d">%s</indexes>' % (len(indexes), indexes))
        for a in range(n):
            row = " ".join("1000000" if a == b else str(rate) for b in range(n)) + " "
            self.write('<u64values length="%d">%s</u64values>' % (len(row), row))
        self.write('</distances2>')

    def save(self, name):
        self.write('</topology>')
        with open(os.path.join(HERE, name), "w") as f:
            f.write("\n".join(self.out) + "\n")


def hgx8():
    m = Machine("8 x H100 SXM, made up", 56, 2)
    gpus = []
    m.begin()
    for p in range(2):
        m.package(p, "Intel(R) Xeon(R) Platinum 8480C", 1 << 40)
        for i in range(4):
            g = 4 * p + i
            m.root(0x10 + 0x10 * g)
            m.pci(0x11 + 0x10 * g, "0302", "10de", 63.015385)
            gpus.append(m.osdev("nvml%d" % g, 1, "NVML", [
                ("Backend", "NVML"), ("GPUVendor", "NVIDIA Corporation"),
                ("GPUModel", "NVIDIA H100 80GB HBM3")]))
            m.osdev("cuda%d" % g, 5, "CUDA", [
                ("Backend", "CUDA"), ("GPUVendor", "NVIDIA Corporation"),
                ("GPUModel", "NVIDIA H100 80GB HBM3"), ("CUDAGlobalMemorySize", str(81559 << 10)),
                ("CUDAMultiProcessors", "132")])
            m.end()
            m.pci(0x12 + 0x10 * g, "0207", "15b3", 63.015385)
            m.osdev("mlx5_%d" % g, 3, "OpenFabrics", [])
            m.end()
            m.end()
        m.end()
    m.end()
    m.numa(21)
    m.nvlink(gpus, 450000)
    m.save("hgx8.xml")


def mixed():
    m = Machine("Mixed workstation, made up", 16, 1)
    m.begin()
    m.package(0, "AMD Ryzen Threadripper PRO 5955WX 16-Cores", 128 << 30)
    m.root(0x20)
    m.pci(0x21, "0302", "10de", 31.507692)
    m.osdev("cuda0", 5, "CUDA", [
        ("Backend", "CUDA"), ("GPUVendor", "NVIDIA Corporation"), ("GPUModel", "NVIDIA A100 80GB PCIe"),
        ("CUDAGlobalMemorySize", str(81049 << 10)), ("CUDAMultiProcessors", "108")])
    m.end()
    m.end()
    m.root(0x40)
    m.pci(0x41, "0300", "1002", 31.507692)
    m.osdev("opencl1d0", 5, "OpenCL", [
        ("Backend", "OpenCL"), ("OpenCLDeviceType", "GPU"), ("GPUVendor", "Advanced Micro Devices, Inc."),
        ("GPUModel", "AMD Radeon RX 7900 XTX"), ("OpenCLComputeUnits", "96"),
        ("OpenCLGlobalMemorySize", str(24 << 20))])
    m.end()
    m.end()
    m.root(0x60)
    m.pci(0x61, "0200", "8086", 7.876923)
    m.osdev("enp97s0", 2, "", [])
    m.end()
    m.end()
    m.end()
    m.end()
    m.save("mixed.xml")


hgx8()
mixed()
