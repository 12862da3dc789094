package dbusapi

const doctype = `<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">
`

// descriptions holds each interface in the introspection format. The tests compare
// them with the tables of methods and properties, and with docs/dbus.
var descriptions = map[string]string{
	ifacePeer: ` <interface name="org.freedesktop.DBus.Peer">
  <method name="Ping"/>
  <method name="GetMachineId">
   <arg name="machine_uuid" type="s" direction="out"/>
  </method>
 </interface>
`,
	ifaceIntrospect: ` <interface name="org.freedesktop.DBus.Introspectable">
  <method name="Introspect">
   <arg name="xml_data" type="s" direction="out"/>
  </method>
 </interface>
`,
	ifaceProperties: ` <interface name="org.freedesktop.DBus.Properties">
  <method name="Get">
   <arg name="interface_name" type="s" direction="in"/>
   <arg name="property_name" type="s" direction="in"/>
   <arg name="value" type="v" direction="out"/>
  </method>
  <method name="GetAll">
   <arg name="interface_name" type="s" direction="in"/>
   <arg name="props" type="a{sv}" direction="out"/>
  </method>
  <method name="Set">
   <arg name="interface_name" type="s" direction="in"/>
   <arg name="property_name" type="s" direction="in"/>
   <arg name="value" type="v" direction="in"/>
  </method>
  <signal name="PropertiesChanged">
   <arg name="interface_name" type="s"/>
   <arg name="changed_properties" type="a{sv}"/>
   <arg name="invalidated_properties" type="as"/>
  </signal>
 </interface>
`,
	ifaceObjects: ` <interface name="org.freedesktop.DBus.ObjectManager">
  <method name="GetManagedObjects">
   <arg name="object_paths_interfaces_and_properties" type="a{oa{sa{sv}}}" direction="out"/>
  </method>
  <signal name="InterfacesAdded">
   <arg name="object_path" type="o"/>
   <arg name="interfaces_and_properties" type="a{sa{sv}}"/>
  </signal>
  <signal name="InterfacesRemoved">
   <arg name="object_path" type="o"/>
   <arg name="interfaces" type="as"/>
  </signal>
 </interface>
`,
	ManagerInterface: ` <interface name="org.castra.Bus1.Manager">
  <method name="Publish">
   <arg name="topic" type="s" direction="in"/>
   <arg name="payload" type="s" direction="in"/>
   <arg name="options" type="a{sv}" direction="in"/>
   <arg name="seq" type="t" direction="out"/>
  </method>
  <method name="WaitAck">
   <arg name="seq" type="t" direction="in"/>
   <arg name="timeout_usec" type="t" direction="in"/>
   <arg name="vm" type="s" direction="out"/>
  </method>
  <method name="Tail">
   <arg name="options" type="a{sv}" direction="in"/>
   <arg name="stream" type="h" direction="out"/>
  </method>
  <method name="Describe">
   <arg name="vms" type="as" direction="in"/>
   <arg name="json" type="s" direction="out"/>
  </method>
  <method name="AddVM">
   <arg name="name" type="s" direction="in"/>
   <arg name="options" type="a{sv}" direction="in"/>
   <arg name="created" type="b" direction="out"/>
   <arg name="key" type="ay" direction="out"/>
  </method>
  <method name="RemoveVM">
   <arg name="name" type="s" direction="in"/>
  </method>
  <method name="RekeyVM">
   <arg name="name" type="s" direction="in"/>
   <arg name="key" type="ay" direction="out"/>
  </method>
  <signal name="VMNew">
   <arg name="name" type="s"/>
   <arg name="path" type="o"/>
  </signal>
  <signal name="VMRemoved">
   <arg name="name" type="s"/>
   <arg name="path" type="o"/>
  </signal>
  <property name="Version" type="s" access="read">
   <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="const"/>
  </property>
  <property name="State" type="s" access="read"/>
  <property name="Faults" type="a(sssss)" access="read"/>
  <property name="Sync" type="s" access="read">
   <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="false"/>
  </property>
  <property name="LogDir" type="s" access="read">
   <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="false"/>
  </property>
  <property name="StateDir" type="s" access="read">
   <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="false"/>
  </property>
  <property name="Listen" type="as" access="read">
   <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="false"/>
  </property>
  <property name="Sessions" type="u" access="read">
   <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="false"/>
  </property>
  <property name="HeadSeq" type="t" access="read">
   <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="false"/>
  </property>
  <property name="Limited" type="a{st}" access="read">
   <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="false"/>
  </property>
 </interface>
`,
	VMInterface: ` <interface name="org.castra.Bus1.VM">
  <property name="Name" type="s" access="read">
   <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="const"/>
  </property>
  <property name="Reachable" type="b" access="read"/>
  <property name="State" type="s" access="read"/>
  <property name="Session" type="s" access="read"/>
  <property name="RemoteAddress" type="s" access="read">
   <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="false"/>
  </property>
  <property name="Subscriptions" type="as" access="read"/>
  <property name="Registered" type="b" access="read"/>
  <property name="Keyed" type="b" access="read"/>
  <property name="LastHandshakeTimestamp" type="t" access="read">
   <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="false"/>
  </property>
  <property name="LastPublishTimestamp" type="t" access="read">
   <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="false"/>
  </property>
  <property name="LastHeartbeatTimestamp" type="t" access="read">
   <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="false"/>
  </property>
  <property name="Lag" type="t" access="read">
   <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="false"/>
  </property>
  <property name="Published" type="t" access="read">
   <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="false"/>
  </property>
  <property name="RateLimited" type="t" access="read">
   <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="false"/>
  </property>
  <property name="Superseded" type="t" access="read">
   <annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="false"/>
  </property>
  <property name="Contended" type="b" access="read"/>
 </interface>
`,
}
