package vpc

// What an account can have. The reference has a code for what is too much
// (reference/instance-metadata-and-vpc.md section 3.7, over_quota) and no
// numbers, so all of them are our choice: far above what an installation of this
// kind needs, and low enough that no account takes the memory of the server and
// the hosts from the others.
const (
	MaxVPCs        = 100  // of an account
	MaxInstances   = 1000 // of an account, in whatever status
	MaxKeys        = 1000 // of an account
	MaxFloatingIPs = 50   // of an account, out of FloatingBlock, which all share
	MaxImages      = 200  // of an account

	MaxSubnets        = 300 // of a VPC
	MaxSecurityGroups = 100 // of a VPC, with its default one
	MaxRules          = 250 // of a security group

	MaxInterfaces      = 5 // of an instance
	MaxInterfaceGroups = 5 // security groups of a network interface
	MaxInstanceKeys    = 20

	MaxUserData = 64 << 10 // of an instance, in bytes
)

// With these, the members of all security groups of a VPC together are at most
// MaxInstances * MaxInterfaces * MaxInterfaceGroups, and the rules that an
// interface is under MaxInterfaceGroups * MaxRules. Their product must never be
// made: a rule about the members of a group has to name the group, not each of
// them.
