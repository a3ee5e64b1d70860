// Two virtio-mmio devices of 4 KiB in the proxy device's BAR 0. Edit the base to what the bridge logs ("BAR 0 is at").
DefinitionBlock ("ssdt.aml", "SSDT", 2, "EBB", "FOREIGN", 1)
{
    Scope (\_SB)
    {
        Device (VM00)
        {
            Name (_HID, "LNRO0005")
            Name (_UID, 0)
            Name (_CRS, ResourceTemplate ()
            {
                Memory32Fixed (ReadWrite, 0xfebfe000, 0x1000)
                Interrupt (ResourceConsumer, Level, ActiveHigh, Exclusive) { 20 }
            })
        }
        Device (VM01)
        {
            Name (_HID, "LNRO0005")
            Name (_UID, 1)
            Name (_CRS, ResourceTemplate ()
            {
                Memory32Fixed (ReadWrite, 0xfebff000, 0x1000)
                Interrupt (ResourceConsumer, Level, ActiveHigh, Exclusive) { 21 }
            })
        }
    }
}
